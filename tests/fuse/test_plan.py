"""In every state a forward runs fused exactly what ``explain`` reports as fused."""

import models
import pytest
import torch
from integration.support import fused_calls
from peft import LoraConfig
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from peftkit import ContractError, accelerate, explain, wrap

pytestmark = pytest.mark.usefixtures("one_thread")

_OPS = {
    "shared input": "lora_qkv",
    "gated MLP": "lora_swiglu_mlp",
    "frozen RMSNorm": "frozen_rms_norm",
    "attention": "attention",
}


def llama(dropout=0.0, **config):
    """A Llama with heads that are wide enough for the native attention."""
    settings = {
        "vocab_size": 97,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(settings | config)))
    return wrap(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout)).train()


def layer(model, index=0):
    return model.base_model.model.model.layers[index]


def step(model):
    ids = torch.arange(40).view(2, 20)
    return model(input_ids=ids, labels=ids).loss


def assert_report_is_what_runs(model):
    """Count the fused calls of a step by op and compare them with the rows of the report."""
    with fused_calls() as calls:
        step(model).backward()
    rows = explain(model).layers
    for method, op in _OPS.items():
        reported = sum(row.method == method and row.path.startswith("fused") for row in rows)
        assert calls[op] == reported, method
    inside = tuple(
        f"{row.name}." for row in rows if row.method == "gated MLP" and row.path != "peft"
    )
    grouped = set()
    for row in rows:
        if row.method == "shared input" and row.path != "peft":
            parent, _, names = row.name.rpartition(".")
            grouped |= {f"{parent}.{name}" for name in names.split("+")}
    alone = [
        row
        for row in rows
        if row.is_adapter
        and row.path != "peft"
        and row.name not in grouped
        and not row.name.startswith(inside)
    ]
    assert calls["lora_linear"] == len(alone)
    assert all(row.reason for row in rows if row.path == "peft")
    return {(row.method, row.reason) for row in rows if row.path == "peft"}


def test_everything_is_fused():
    assert assert_report_is_what_runs(llama()) == set()


def twice(*args, **kwargs):
    """A function that replaces another."""
    return 2 * args[0]


class Double(nn.Module):
    """A parametrisation."""

    def forward(self, weight):
        return 2 * weight


def set_attribute(owner_of, name, value):
    """A change that assigns an attribute; the test undoes it."""
    return lambda model, patch: patch.setattr(owner_of(model), name, value)


CHANGES = {
    "hook on the activation": (
        "gated MLP",
        "its act_fn has hooks",
        lambda m, p: layer(m).mlp.act_fn.register_forward_hook(lambda *a: None),
    ),
    "another activation": (
        "gated MLP",
        "is now a Tanh",
        set_attribute(lambda m: layer(m).mlp, "act_fn", nn.Tanh()),
    ),
    "forward of the activation": (
        "gated MLP",
        "forward of its own",
        set_attribute(lambda m: layer(m).mlp.act_fn, "forward", torch.tanh),
    ),
    "forward of the MLP's class": (
        "gated MLP",
        "LlamaMLP.forward was replaced",
        lambda m, p: p.setattr(
            LlamaMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x) + self.gate_proj(x))
        ),
    ),
    "silu of torch": (
        "gated MLP",
        "torch.nn.functional.silu was replaced",
        lambda m, p: p.setattr(F, "silu", twice),
    ),
    "hook on a linear of the MLP": (
        "gated MLP",
        "its base layer has hooks",
        lambda m, p: layer(m).mlp.down_proj.base_layer.register_forward_hook(lambda *a: None),
    ),
    "eps of a norm": (
        "frozen RMSNorm",
        "variance_epsilon was",
        set_attribute(lambda m: layer(m).input_layernorm, "variance_epsilon", 0.1),
    ),
    "forward of the norm's class": (
        "frozen RMSNorm",
        "LlamaRMSNorm.forward was replaced",
        lambda m, p: p.setattr(LlamaRMSNorm, "forward", lambda self, x: x * self.weight),
    ),
    "parametrised norm": (
        "frozen RMSNorm",
        "parametrised",
        lambda m, p: parametrize.register_parametrization(
            layer(m).input_layernorm, "weight", Double()
        ),
    ),
    "trained norm": (
        "frozen RMSNorm",
        "is trained",
        lambda m, p: layer(m).input_layernorm.weight.requires_grad_(),
    ),
    "attention function registered": (
        "attention",
        "registered as 'sdpa'",
        lambda m, p: p.setitem(
            AttentionInterface._global_mapping,
            "sdpa",
            lambda module, q, k, v, *args, **kwargs: (q.transpose(1, 2).contiguous(), None),
        ),
    ),
    "attention of torch": (
        "attention",
        "scaled_dot_product_attention was replaced",
        lambda m, p: p.setattr(F, "scaled_dot_product_attention", lambda q, *args, **kwargs: q),
    ),
    "linear of torch": (
        "LoRA",
        "the forward of Linear, its base layer, was replaced",
        lambda m, p: p.setattr(nn.Linear, "forward", lambda self, x: x @ self.weight.T),
    ),
    "merged": ("LoRA", "merged into the base weight", lambda m, p: m.merge_adapter()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_wrap_runs_the_modules_own_forward_and_is_reported(change, monkeypatch):
    method, reason, act = CHANGES[change]
    model = llama()
    before = step(model)
    with monkeypatch.context() as patch:
        act(model, patch)
        if change == "merged":
            model.eval()
            with torch.no_grad(), fused_calls() as calls:
                step(model)
            assert calls["lora_linear"] == calls["lora_qkv"] == calls["lora_swiglu_mlp"] == 0
            reasons = {
                (row.method, row.reason) for row in explain(model).layers if row.path == "peft"
            }
        else:
            reasons = assert_report_is_what_runs(model)
        changed = step(model)
    assert any(m == method and reason in why for m, why in reasons), reasons
    alike = change in ("hook on the activation", "hook on a linear of the MLP", "trained norm")
    if change not in ("merged", "linear of torch") and not alike:
        assert not torch.allclose(changed, before), "the change was ignored"


def test_a_restored_attribute_runs_fused_again(monkeypatch):
    model = llama()
    expected = step(model)
    with monkeypatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", lambda self, x: x)
        assert not torch.equal(step(model), expected)
    assert torch.equal(step(model), expected)
    assert assert_report_is_what_runs(model) == set()


def test_attention_dropout_in_training_is_reported():
    model = llama(attention_dropout=0.1)
    ((method, reason),) = assert_report_is_what_runs(model)
    assert method == "attention"
    assert "attention dropout of 0.1 is on" in reason
    assert explain(model.eval()).blocks["attention"] == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_dtype_that_the_native_attention_does_not_support_is_reported(dtype):
    reasons = assert_report_is_what_runs(llama().to(dtype))
    (reason,) = (reason for method, reason in reasons if method == "attention")
    assert f"{dtype}; the native passes compute in float32" in reason


def test_under_autocast_the_attention_runs_as_reported():
    model = llama()
    with torch.autocast("cpu", torch.bfloat16):
        with fused_calls() as calls:
            step(model)
        rows = [row for row in explain(model).layers if row.method == "attention"]
    assert calls["attention"] == sum(row.path == "fused:torch" for row in rows)


def test_an_activation_without_a_fused_form_has_a_row_and_a_reason():
    rows = [row for row in explain(llama(hidden_act="relu")).layers if row.method == "gated MLP"]
    assert {(row.path, row.reason) for row in rows} == {
        ("peft", "its activation (ReLU) has no fused form")
    }


def test_disabled_adapters_are_reported_with_the_code_that_runs():
    model = llama()
    with model.disable_adapter():
        reasons = {row.reason for row in explain(model).layers if row.is_adapter}
        with fused_calls() as calls:
            step(model)
    assert reasons == {"adapters are disabled"}
    assert not calls["lora_linear"] + calls["lora_qkv"] + calls["lora_swiglu_mlp"]


STRICT = {
    "joint projection with dropout": (
        lambda: models.tiny("phi3"),
        LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3),
        r"mlp \(gated MLP\): the joint projection",
    ),
    "embedding": (
        lambda: models.tiny("llama"),
        LoraConfig(r=4, target_modules=["embed_tokens"]),
        "lora.Embedding layers have no fused forward",
    ),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3)),
        LoraConfig(r=4, target_modules=["0"]),
        "lora.Conv2d layers have no fused forward",
    ),
}


@pytest.mark.parametrize("case", STRICT)
def test_strict_refuses_what_a_training_step_would_not_run_fused(case):
    make, config, message = STRICT[case]
    with pytest.raises(ContractError, match=message):
        wrap(make(), config, strict=True)


def test_strict_checks_training_in_any_mode():
    model = llama(attention_dropout=0.1).eval()
    with pytest.raises(ContractError, match=r"attention dropout of 0\.1 is on"):
        accelerate(model, strict=True)
    assert not any(module.training for module in model.modules())
    assert explain(model).blocks["gated MLP"] == 2
