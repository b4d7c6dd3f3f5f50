"""Experts stacked and stored in four bits: merged into 16 and 32 bits, in the layout of the architecture's checkpoints and in little memory."""

import json
import os
import resource
import signal
import subprocess
import sys

import expert_cases
import merge_cases as cases
import pytest
import torch
import transformers as hf
from bitsandbytes import functional as bnb
from peft import LoraConfig, PeftModel, get_peft_model
from typer.testing import CliRunner

from peftkit import ContractError, load_base, merge, wrap
from peftkit.cli.main import app
from peftkit.find.stacks import packed_stacks

pytestmark = pytest.mark.usefixtures("one_thread")

every = pytest.mark.parametrize("name", expert_cases.NAMES)
ADAPTERS = {
    "both stacks": ["experts.gate_up_proj", "experts.down_proj"],
    "one stack": ["experts.down_proj"],
    "attention": [],
}


def adapted(folder, adapter="both stacks", add=wrap):
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=ADAPTERS[adapter])
    torch.manual_seed(0)
    return cases.trained(add(load_base(folder, "nf4"), config))


def inputs():
    ids = torch.randint(0, 96, (4, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids}


def decoded(model, folder):
    """The model of a folder in float32, with the values of the stored codes by bitsandbytes' own function."""
    dense = load_base(folder, "fp32")
    for name, module in model.get_base_model().named_modules():
        name = name.replace(".base_layer", "")
        if type(module).__name__ == "Linear4bit":
            weight = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
            dense.get_submodule(name).weight.data.copy_(weight)
        for own, stack in packed_stacks(module).items():
            state = bnb.QuantState.from_dict(stack.state.as_dict(packed=True), torch.device("cpu"))
            state.dtype = torch.float32
            weight = bnb.dequantize_4bit(stack.packed.data, state)
            getattr(dense.get_submodule(name), own).data.copy_(weight)
    return dense


@every
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_files_are_those_of_pefts_merge_into_the_decoded_weights(name, adapter, tmp_path):
    base = expert_cases.saved(name, tmp_path / "base")
    model = adapted(base, adapter)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = inputs()
    tuned = cases.logits(model, batch)
    options = {"probe": batch, "rounding": "nearest", "max_shard_size": "50KB"}

    exact = merge(model, tmp_path / "fp32", "fp32", **options)
    narrow = merge(model, tmp_path / "bf16", "bf16", **options)

    assert exact.recovery > 1 - 1e-8
    assert narrow.recovery > 0.99
    assert exact.outputs.effect > 0.01
    assert "the decoded quantised weights (nf4)" in exact.facts["merged_into"]
    model.save_pretrained(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(decoded(model, base), tmp_path / "adapter")
    reference = cases.by_peft(plain, tmp_path / "peft")
    written, rounded = cases.tensors(tmp_path / "fp32"), cases.tensors(tmp_path / "bf16")
    assert written.keys() == rounded.keys() == reference.keys()
    for key, tensor in reference.items():
        assert torch.equal(written[key], tensor), key
        assert torch.equal(rounded[key], tensor.to(rounded[key].dtype)), key
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "fp32")
    torch.testing.assert_close(cases.logits(loaded, batch), tuned, rtol=1e-4, atol=1e-4)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_stack_whose_model_has_16_bits_is_decoded_to_float32(tmp_path):
    base = expert_cases.saved("qwen3_moe", tmp_path / "base", torch.bfloat16)
    model = adapted(base)
    found = merge(model, tmp_path / "merged", "fp32", probe=inputs())
    assert found.recovery > 1 - 1e-8
    model.save_pretrained(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(decoded(model, base), tmp_path / "adapter")
    reference = cases.by_peft(plain, tmp_path / "peft")
    written = cases.tensors(tmp_path / "merged")
    for key in reference:
        if ".experts." in key:
            assert torch.equal(written[key], reference[key]), key


@pytest.mark.parametrize("way", ["PEFT alone", "layers that did not run"])
def test_other_ways(way, tmp_path):
    base = expert_cases.saved("mixtral", tmp_path / "base")
    if way == "PEFT alone":
        model = adapted(base, "attention", get_peft_model)
        assert merge(model, tmp_path / "merged", probe=inputs()).recovery > 0.99
    else:
        model = adapted(base)
        merge(model, tmp_path / "merged", "fp32", certificate=False, rounding="nearest")
        merge(model, tmp_path / "with", "fp32", rounding="nearest")
        expected = cases.tensors(tmp_path / "with")
        for key, tensor in cases.tensors(tmp_path / "merged").items():
            assert torch.equal(tensor, expected[key]), key
    hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_what_is_refused(tmp_path):
    base = expert_cases.saved("mixtral", tmp_path / "base")
    model = adapted(base)
    with pytest.raises(ContractError, match="pass dtype='bf16'"):
        merge(model, tmp_path / "merged", "base")
    with pytest.raises(ContractError, match=r"base_weights=.* linear layers only"):
        merge(model, tmp_path / "merged", base_weights=base)
    with pytest.raises(ContractError, match=r"peftkit\.merge\(model, OUT, dtype='bf16'\)"):
        model.get_base_model().model.layers[0].mlp.experts.merge()
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("stored", [False, True], ids=["--quantize nf4", "saved in 4 bits"])
def test_the_command(stored, tmp_path):
    base = expert_cases.saved("qwen3_moe", tmp_path / "base", torch.bfloat16)
    model = adapted(base)
    model.save_pretrained(tmp_path / "adapter")
    options = ["--any-recovery", "--json"]
    if stored:
        load_base(base, "nf4").save_pretrained(tmp_path / "nf4")
        base = tmp_path / "nf4"
    else:
        options += ["--quantize", "nf4"]
    out = tmp_path / "merged"
    done = CliRunner().invoke(
        app, ["merge", *map(str, (tmp_path / "adapter", base, out)), *options]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["merged_into"].startswith("the decoded quantised weights (nf4)")
    merge(model, tmp_path / "expected", min_recovery=None)
    expected = cases.tensors(tmp_path / "expected")
    written = cases.tensors(out)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in written)


_CHILD = """
import sys
from pathlib import Path
import torch
from base_memory import Anonymous
from peftkit import load_adapter, load_base, merge

torch.set_num_threads(1)
folder = Path(sys.argv[1])
ids = torch.arange(16).view(2, 8)

def merged(name):
    model = load_adapter(load_base(folder / name, "nf4"), folder / f"{name} adapter")
    with Anonymous() as anonymous:
        merge(model, folder / f"{name} merged", probe=ids, rounding="nearest", min_recovery=None)
    return anonymous.peak - anonymous.start

merged("2 layers")  # what the imports and the first calls need is not part of the measurement
print(merged("2 layers again"), merged("8 layers"))
"""


def mixture(folder, layers, hidden=256, width=512, experts=8):
    config = hf.Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=experts,
        num_experts_per_tok=2,
        moe_intermediate_size=width,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    hf.Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return 3 * experts * hidden * width * 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_the_peak_does_not_grow_with_the_model(tmp_path):
    for layers in ("2 layers", "2 layers again", "8 layers"):
        block = mixture(tmp_path / layers, int(layers[0]))
        model = adapted(tmp_path / layers)
        model.save_pretrained(tmp_path / f"{layers} adapter")
        del model
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    few, many = (int(number) / block for number in done.stdout.split()[-2:])
    # block: all experts of one layer in float32. The decoded stacks, PEFT's merged copy of them, its update, what is stored, and the differences
    # that are measured are in memory together; the model has eight blocks
    assert max(few, many) < 6, (few, many)
    assert many - few < 0.5, (few, many)


def test_a_full_disk_leaves_nothing(tmp_path):
    model = adapted(expert_cases.saved("mixtral", tmp_path / "base"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        with pytest.raises(OSError, match="could not be written"):
            merge(model, tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    merge(model, tmp_path / "merged")


_KILLED = """
import os, signal, sys
from peftkit import load_adapter, load_base, merge
from peftkit.merging.files import ShardWriter

add = ShardWriter.add
def killed(self, name, tensor):
    add(self, name, tensor)
    if ".experts." in name:
        os.kill(os.getpid(), signal.SIGKILL)
ShardWriter.add = killed
base, adapter, out = sys.argv[1:]
merge(load_adapter(load_base(base, "nf4"), adapter), out)
"""


def test_a_killed_process_leaves_no_folder_that_looks_complete(tmp_path):
    base = expert_cases.saved("mixtral", tmp_path / "base")
    model = adapted(base)
    model.save_pretrained(tmp_path / "adapter")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    paths = map(str, (base, tmp_path / "adapter", tmp_path / "merged"))
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, *paths], env=environment, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = (path for path in tmp_path.iterdir() if path.name.startswith("merged"))
    assert left.name.startswith("merged.partial-")
    assert not list(left.glob("*.safetensors"))
    merge(model, tmp_path / "merged")
