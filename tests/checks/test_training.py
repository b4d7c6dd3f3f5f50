"""The behaviour that all methods share, with PEFT: start, training, disabling, saving, loading, several adapters."""

import copy
import subprocess
import sys

import models
import pairs
import peft
import pytest
import torch
from methods import METHODS, gated, houlsby, lora, trained, wrapped
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lab.testing import assert_no_worse_than
from peftkit import check, explain, load_adapter, restore, wrap
from peftkit.compatibility.rounding import same_up_to_rounding

NOT_THE_BASE_AT_FIRST = ("prefix",)
FAMILIES = ("llama", "bert", "t5")


@pytest.fixture(autouse=True)
def _quick(one_thread):
    """Tiny models gain nothing from more threads."""


def loss(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**models.batch(name)).loss


def logits(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**models.batch(name)).logits


both = pytest.mark.parametrize("name", FAMILIES)
every = pytest.mark.parametrize("method", METHODS)


@both
@every
def test_a_new_adapter_equals_the_base_model_if_the_paper_says_so(method, name):
    base = models.tiny(name).eval()
    expected = logits(base, name)
    actual = logits(restore(wrapped(method, name)), name)
    same = torch.equal(actual, expected)
    assert same == (method not in NOT_THE_BASE_AT_FIRST)


@both
@every
def test_a_step_trains_the_adapter_and_nothing_else(method, name):
    model = trained(wrapped(method, name)).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    own = {n for n, p in model.named_parameters() if p.requires_grad}
    parts = ("lora_", ".adapters.default.", ".modules_to_save.default.")
    assert own == {n for n in before if any(part in n for part in parts)}
    report = check(model, models.batch(name))
    assert all(report.grad_norms[n] > 0 for n in own), report
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**models.batch(name)).loss.backward()
    optimiser.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == own


@both
@every
def test_disabling_and_unloading_give_the_base_model_back(method, name):
    base = models.tiny(name).eval()
    expected, state = logits(base, name), base.state_dict()
    model = restore(trained(wrapped(method, name)))
    adapted = logits(model, name)
    assert not same_up_to_rounding(adapted, expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, name), expected)
    assert torch.equal(logits(model, name), adapted)
    heads = model.peft_config["default"].modules_to_save or []
    unloaded = model.unload()
    for head in heads:  # which PEFT leaves as it was trained
        unloaded.get_submodule(head).load_state_dict(base.get_submodule(head).state_dict())
    assert torch.equal(logits(unloaded, name), expected)
    assert {n: type(m) for n, m in unloaded.named_modules()} == {
        n: type(m) for n, m in base.named_modules()
    }
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unloaded.modules())
    assert unloaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in unloaded.state_dict().items())


@both
@every
def test_a_saved_adapter_is_loaded_bit_for_bit(method, name, tmp_path):
    model = trained(wrapped(method, name))
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("default" in key for key in held)
    assert sum(t.numel() for t in held.values()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    for loaded in (
        load_adapter(models.tiny(name).eval(), tmp_path, accelerate=False),
        PeftModel.from_pretrained(models.tiny(name).eval(), tmp_path),
    ):
        again = peft.get_peft_model_state_dict(loaded)
        assert again.keys() == held.keys()
        assert all(torch.equal(again[key], held[key]) for key in held)
        assert torch.equal(logits(loaded.eval(), name), logits(restore(model), name))


@every
def test_a_checkpoint_with_a_wrong_key_is_refused(method, tmp_path):
    from safetensors.torch import save_file

    from peftkit import ContractError

    model = wrapped(method, "llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    held = load_file(file)
    first = sorted(held)[0]
    held[first.replace("layers.0", "layers.9")] = held.pop(first)
    save_file(held, file)
    with pytest.raises(ContractError, match=r"1 of \d+ keys is missing(.|\n)*1 key is left over"):
        load_adapter(models.tiny("llama"), tmp_path)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "LoRA"])
def test_merging_is_refused_with_the_reason_and_changes_nothing(method):
    model = trained(wrapped(method, "llama"))
    expected = logits(model, "llama")
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged: it is not linear"):
            merge()
    assert torch.equal(logits(model, "llama"), expected)


@every
def test_several_adapters_are_switched_and_deleted(method, tmp_path):
    model = trained(wrapped(method, "llama"))
    first, exact = logits(model, "llama"), logits(pairs.in_float64(model), "llama")
    # the resolved config of the first adapter, in the form that PEFT's own API takes
    torch.manual_seed(3)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    assert torch.equal(logits(model, "llama"), first)
    model.set_adapter("second")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".second" in n
    }
    for n, p in model.named_parameters():
        if ".second" in n:
            nn.init.normal_(p, std=0.3)
    second, exact_second = logits(model, "llama"), logits(pairs.in_float64(model), "llama")
    assert not same_up_to_rounding(second, first)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    loaded = PeftModel.from_pretrained(models.tiny("llama").eval(), tmp_path / "second")
    assert torch.equal(logits(restore(loaded), "llama"), logits(restore(model), "llama"))
    model.set_adapter("default")
    assert_no_worse_than(logits(model, "llama"), first, exact)
    model.delete_adapter("second")
    assert not any(".second" in n for n, _ in model.named_parameters())
    assert_no_worse_than(logits(model, "llama"), first, exact)
    model.load_adapter(tmp_path / "second", "third")
    model.set_adapter("third")
    assert_no_worse_than(logits(model, "llama"), second, exact_second)


@pytest.mark.parametrize("use_reentrant", [False, True])
@every
def test_checkpointing_gives_the_same_gradients(method, use_reentrant):
    batch = models.batch("llama")
    model = trained(wrapped(method, "llama")).train()
    plain = pairs.step(model, batch)
    truth = pairs.step(pairs.in_float64(model), batch, pairs.loss_from_logits)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    checkpointed = pairs.step(model, batch)
    for n in plain:
        assert_no_worse_than(checkpointed[n], plain[n], truth[n], n)


@every
def test_adapters_of_a_bf16_base_are_float32_and_as_near_as_plain_torch(method, monkeypatch):
    model = trained(wrapped(method, "llama", dtype=torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    actual = logits(model, "llama")
    assert actual.dtype is torch.bfloat16
    truth = logits(trained(wrapped(method, "llama", dtype=torch.bfloat16)).float(), "llama")
    with monkeypatch.context() as patch:
        patch.setattr(
            "peftkit_kernels.ops.bottleneck.op.choose_backend", lambda *_, **__: "reference"
        )
        patch.setattr("peftkit.prefix.attention.standing_obstacle", lambda *_: "joined keys")
        plain = logits(restore(model), "llama")
    assert_no_worse_than(actual, plain, truth)


FUSED_BOTTLENECK = ("bottleneck", "fused:torch", "")
GATED = ("prefix", "torch", "separate softmax, added to the model's: its attention is sdpa")
EXPLAINED = {
    "LoRA": set(),
    "bottleneck": {FUSED_BOTTLENECK},
    "pfeiffer": {FUSED_BOTTLENECK},
    "parallel": {FUSED_BOTTLENECK},
    "prefix": {("prefix", "fused:torch", "")},
    "gated prefix": {GATED},
    "prefix and bottleneck": {GATED, FUSED_BOTTLENECK},
    "LoRA and parallel": {FUSED_BOTTLENECK},
    "all three": {GATED, FUSED_BOTTLENECK},
}


@every
def test_explain_and_generate(method):
    model = trained(wrapped(method, "llama"))
    report = explain(model)
    names = {layer.method for layer in report.layers if layer.is_adapter}
    expected = {
        "LoRA": {"LoRA"},
        "LoRA and parallel": {"LoRA", "bottleneck"},
        "all three": {"LoRA", "bottleneck", "prefix"},
        "prefix and bottleneck": {"bottleneck", "prefix"},
    }
    own = "prefix" if "prefix" in method else "bottleneck"
    assert names == expected.get(method, {own})
    paths = {(r.method, r.path, r.reason) for r in report.layers if r.method != "LoRA"}
    assert {row for row in paths if row[0] in ("bottleneck", "prefix")} == EXPLAINED[method]
    assert not any("adapters" in name for name in report.left_out)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = {"input_ids": models.batch("llama")["input_ids"][:1]}
    cached = model.generate(**ids, **settings)
    assert torch.equal(cached, model.generate(**ids, **settings, use_cache=False))


def test_lora_added_next_to_a_bottleneck_does_not_change_the_bottleneck(tmp_path):
    narrow = LoraConfig(r=4, target_modules=["q_proj"])
    model = trained(wrap(models.tiny("llama").eval(), narrow, houlsby()))
    keys, first = peft.get_peft_model_state_dict(model).keys(), logits(model, "llama")
    exact = logits(pairs.in_float64(model), "llama")
    config = copy.deepcopy(model.peft_config["default"])
    config.target_modules = {"q_proj", "o_proj"}
    model.add_adapter("second", config)
    assert peft.get_peft_model_state_dict(model).keys() == keys
    assert_no_worse_than(logits(model, "llama"), first, exact)


def test_plain_peft_loads_after_the_import_and_raises_without_it(tmp_path):
    torch.manual_seed(0)
    model = trained(get_peft_model(models.tiny("llama").eval(), gated()))
    expected = logits(model, "llama")
    models.tiny("llama").save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    code = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
try:
    PeftModel.from_pretrained(base, sys.argv[2])
except (KeyError, ValueError) as error:
    assert "PEFTKIT_PREFIX" in str(error), error
else:
    raise AssertionError("plain PEFT knows the type")
import peftkit.bridge
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
torch.save(model(**torch.load(sys.argv[3])).logits.detach(), sys.argv[4])
"""
    torch.save(models.batch("llama"), tmp_path / "batch")
    arguments = [str(tmp_path / part) for part in ("base", "adapter", "batch", "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        (lambda: (houlsby(), houlsby()), "two BottleneckConfigs; give one"),
        (lambda: (houlsby(), peft.IA3Config()), "IA3Config cannot be mixed"),
    ],
)
def test_invalid_mixes_are_refused(configs, message):
    with pytest.raises(ValueError, match=message):
        wrap(models.tiny("llama"), *configs())


@pytest.mark.parametrize("mixed", [False, True])
def test_an_architecture_without_dispatch_is_refused_before_anything_changes(mixed):
    import families

    model = families.family("bloom")
    before = {n: (type(m), len(m._forward_hooks)) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match="BloomForCausalLM cannot have a KV prefix"):
        wrap(model, gated(), *([lora()] if mixed else []))
    assert {n: (type(m), len(m._forward_hooks)) for n, m in model.named_modules()} == before
