"""A base model that stays in its files: the same merged files as from memory, and memory for about one layer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import base_memory
import merge_cases as cases
import models
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from peftkit import load_adapter, merge
from peftkit.merging.loading import load_for_merging
from peftkit.merging.mapped import files_of, load_mapped

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(folder, method="LoRA", name="llama", dtype=torch.bfloat16, config=None, base=None):
    """Save a base model in several files and an adapter whose config names it. Returns the class of the model."""
    base = base or models.tiny(name, dtype=dtype)
    base.save_pretrained(folder / "base", max_shard_size="20KB")
    base = type(base).from_pretrained(folder / "base")
    model = cases.trained(get_peft_model(base, config or cases.CONFIGS[method]()))
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return type(base)


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def note_of(model):
    return files_of(model.get_base_model()).note


def assert_same_files(folder, cls, dtype="bf16", **options):
    """Merge from the files and from memory."""
    before = content(folder / "base")
    mapped = load_for_merging(folder / "adapter", str(folder / "base"))
    assert files_of(mapped.get_base_model()).mapped
    in_memory = load_adapter(
        cls.from_pretrained(folder / "base"), folder / "adapter", accelerate=False
    )
    settings = {"max_shard_size": "30KB", "min_recovery": None, **options}

    merge(mapped, folder / "from files", dtype, **settings)
    merge(in_memory, folder / "from memory", dtype, **settings)

    found, expected = content(folder / "from files"), content(folder / "from memory")
    certificates = [json.loads(files.pop("merge.json")) for files in (found, expected)]
    notes = [certificate.pop("base_read_from") for certificate in certificates]
    assert notes[0] == note_of(mapped)
    assert notes[1] == "a model in memory"
    assert certificates[0] == certificates[1]
    assert found == expected
    assert len(found) > 4
    assert content(folder / "base") == before
    return notes[0]


@pytest.mark.parametrize(
    "method", ["LoRA", "DoRA", "LoRA of embeddings", "LoRA with a head", "LoRA with tokens", "IA3"]
)
def test_the_files_equal_those_of_a_merge_in_memory(tmp_path, method):
    note = assert_same_files(tmp_path, saved(tmp_path, method))
    assert note == f"the files in {tmp_path / 'base'}, one layer at a time"


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "base"])
def test_every_dtype(tmp_path, dtype):
    cls = saved(tmp_path, "LoRA", dtype=torch.float32)
    assert "copied" not in assert_same_files(tmp_path, cls, dtype, rounding="nearest")


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "t5"])
def test_other_architectures_and_tied_weights(tmp_path, name):
    cls = saved(tmp_path, name=name, config=LoraConfig(r=4, target_modules="all-linear"))
    assert_same_files(tmp_path, cls)


def test_weights_that_differ_from_their_files_are_copied_and_counted(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    size = sum(p.nbytes for p in models.tiny("llama", dtype=torch.float32).parameters())

    note = assert_same_files(tmp_path, hf.LlamaForCausalLM)

    assert f"one layer at a time; {size / 2**20:.1f} MiB were copied into memory" in note


def test_stacked_experts_are_assembled_one_layer_at_a_time(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    base = hf.MixtralForCausalLM(hf.MixtralConfig(vocab_size=models.VOCAB_SIZE, **sizes, **heads))
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])

    note = assert_same_files(tmp_path, saved(tmp_path, config=lora, base=base))

    assert note == f"the files in {tmp_path / 'base'}, one layer at a time"
    mapped = load_mapped(str(tmp_path / "base"), hf.MixtralForCausalLM)
    assert not files_of(mapped).copied(mapped)
    expected = hf.MixtralForCausalLM.from_pretrained(tmp_path / "base")
    for name, parameter in expected.named_parameters():
        assert torch.equal(mapped.get_parameter(name) + 0, parameter), name


def test_released_pages_are_read_again(tmp_path):
    saved(tmp_path)
    model = load_mapped(str(tmp_path / "base"), hf.LlamaForCausalLM)
    expected = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    for _ in range(2):
        assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())
        files_of(model).release()


def test_what_cannot_stay_in_files_is_loaded_and_the_note_says_why(tmp_path):
    saved(tmp_path, config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapter, base = tmp_path / "adapter", str(tmp_path / "base")
    model = load_for_merging(adapter, base, "int8")
    assert not files_of(model.get_base_model()).mapped
    assert note_of(model) == f"{base}, loaded into memory as a whole: it is quantised to int8"

    settings = hf.BitsAndBytesConfig(load_in_8bit=True)
    quantised = hf.LlamaForCausalLM.from_pretrained(base, quantization_config=settings)
    quantised.save_pretrained(tmp_path / "quantised")
    note = note_of(load_for_merging(adapter, str(tmp_path / "quantised")))
    assert note.endswith("as a whole: its weights are quantised (int8)")

    (tmp_path / "pickle").mkdir()
    weights = hf.LlamaForCausalLM.from_pretrained(base).state_dict()
    torch.save(weights, tmp_path / "pickle/pytorch_model.bin")
    (tmp_path / "pickle/config.json").write_bytes(Path(base, "config.json").read_bytes())
    note = note_of(load_for_merging(adapter, str(tmp_path / "pickle")))
    assert "as a whole:" in note
    assert "its weights are pickle files" in note

    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"init_lora_weights": "olora"})
    )
    note = note_of(load_for_merging(adapter, base))
    assert note.endswith("as a whole: init_lora_weights='olora' changes its weights")


def test_files_that_cannot_be_mapped_are_loaded(tmp_path, monkeypatch):
    saved(tmp_path)

    def fail(*_, **__):
        raise OSError("no such device")

    monkeypatch.setattr("peftkit.merging.mapped.mmap.mmap", fail)
    model = load_for_merging(tmp_path / "adapter", str(tmp_path / "base"))
    assert note_of(model).endswith("cannot be mapped into memory: no such device")
    assert not files_of(model.get_base_model()).mapped


_CHILD = """
import sys
from pathlib import Path
import torch
from base_memory import Anonymous, _status
from peftkit import merge
from peftkit.merging.loading import load_for_merging

torch.set_num_threads(1)
folder = Path(sys.argv[1])
ids = torch.arange(16).view(2, 8)

def merged(base):
    model = load_for_merging(folder / f"{base} adapter", str(folder / base))
    merge(model, folder / f"{base} merged", probe=ids, rounding="nearest", min_recovery=None)

merged("small")  # what the imports and the first calls need is not part of the measurement
Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
start = _status("VmRSS")
with Anonymous() as anonymous:
    merged("large")
print(_status("VmHWM") - start, anonymous.peak - anonymous.start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_the_peak_is_a_few_copies_of_the_largest_tensor(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 128, "vocab_size": 2000}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    for name, layers in (("small", 1), ("large", 10)):
        folder = tmp_path / name
        folder.mkdir()
        largest = base_memory.write_checkpoint(
            folder, sizes | heads | {"num_hidden_layers": layers}
        )
        model = load_mapped(str(folder), hf.LlamaForCausalLM)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(tmp_path / f"{name} adapter")
    size = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))

    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _CHILD, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    peaks = [int(number) for number in done.stdout.split()[-2:]]

    # the files have 16 bits a value, and a merge computes in float32
    assert size > 300e6
    assert max(peaks) < 8 * 2 * largest < size / 2, [peak / largest for peak in peaks]
