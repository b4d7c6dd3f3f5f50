"""Each reason why a layer is not fused, and that the forward does what the reason says."""

import models
import pairs
import pytest
import torch
from fused_pairs import adapt
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils import parametrize

from peftkit import accelerate
from peftkit.fuse.adapter import class_reason, has_hooks


class Identity(nn.Module):
    """A parametrisation that does not change the weight."""

    def forward(self, weight):
        return weight


def obstacle(layer):
    """The reason that ``explain`` gives for a layer: that of its plan, or of its class."""
    if hasattr(layer, "peftkit_verdict"):
        return layer.peftkit_verdict()[1] or None
    return class_reason(layer)


def layer_of(model):
    """A layer of the tiny Llama."""
    return model.get_submodule("base_model.model.model.layers.1.self_attn.o_proj")


def offload(layer):
    layer.base_layer._hf_hook = object()


def two_adapters(layer):
    layer.update_layer("second", 2, lora_alpha=2, config=LoraConfig())
    layer.set_adapter(["default", "second"])


REASONS = {
    "adapters are disabled": lambda layer: layer.enable_adapters(False),
    "adapters are merged into the base weight (default)": lambda layer: layer.merge(),
    "no active adapter has weights in it": lambda layer: layer.set_adapter([]),
    "2 adapters are active (default, second); exactly one can be fused": two_adapters,
    "adapter default has a bias of its own (lora_bias=True)": lambda layer: layer.lora_bias.update(
        default=True
    ),
    "casting of the input dtype is switched off": lambda layer: setattr(
        layer, "cast_input_dtype_enabled", False
    ),
    "adapter default uses AlphaDropout as its dropout": lambda layer: layer.lora_dropout.update(
        {"default": nn.AlphaDropout()}
    ),
    "lora_B of adapter default is a Sequential, not a plain Linear": lambda layer: (
        layer.lora_B.update({"default": nn.Sequential(layer.lora_B["default"])})
    ),
    "its base layer is trained": lambda layer: layer.base_layer.weight.requires_grad_(),
    "its base layer has hooks": lambda layer: layer.base_layer.register_forward_hook(print),
    "its lora_A has hooks": lambda layer: layer.lora_A["default"].register_forward_pre_hook(print),
    "its dropout has hooks": lambda layer: layer.lora_dropout["default"].register_forward_hook(
        print
    ),
    "the weight of its lora_B is parametrised": lambda layer: parametrize.register_parametrization(
        layer.lora_B["default"], "weight", Identity()
    ),
    "its base weight is computed (parametrised or offloaded), not a parameter": lambda layer: (
        parametrize.register_parametrization(layer.base_layer, "weight", Identity())
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_reason(reason):
    layer = layer_of(pairs.pair("llama")[1])
    assert obstacle(layer) is None
    REASONS[reason](layer)
    said = obstacle(layer)
    # a parametrised linear has its own class, which gives the first reason
    expected = {reason, "lora_B of adapter default is a ParametrizedLinear, not a plain Linear"}
    expected.add("its base layer is a ParametrizedLinear, not a plain Linear or Conv1D")
    assert said in (expected if "parametrised" in reason else {reason})


# Hooks would print here; test_linear.py tests them. lora_bias only has an effect if PEFT creates the adapter.
@pytest.mark.parametrize("reason", [r for r in REASONS if "hooks" not in r and "bias" not in r])
def test_the_forward_follows_the_reason(reason, monkeypatch):
    plain, fused = (layer_of(model) for model in pairs.pair("llama", torch.float64))
    x = torch.randn(2, 3, fused.in_features, dtype=torch.float64)
    fused(x)
    for layer in (plain, fused):
        torch.manual_seed(0)
        REASONS[reason](layer)
    with pairs.counted(monkeypatch) as calls:
        actual = fused.eval()(x)
    assert calls == {"peft": 1}
    assert torch.equal(actual, plain.eval()(x))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            {"target_modules": ["embed_tokens"]},
            "lora.Embedding layers have no fused forward",
        ),
        (
            {
                "target_modules": ["q_proj"],
                "alora_invocation_tokens": [5],
                "task_type": "CAUSAL_LM",
            },
            "is a LoRA variant (ALoraLinearVariant)",
        ),
    ],
)
def test_reason_by_config(config, reason):
    model = accelerate(get_peft_model(models.tiny("llama"), LoraConfig(**config)))
    reasons = {obstacle(m) for m in model.modules() if isinstance(m, BaseTunerLayer)}
    assert len(reasons) == 1
    assert reason in reasons.pop()


def test_convolutions_have_no_fused_forward():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model = get_peft_model(model, LoraConfig(target_modules=["0"]))
    layer = next(m for m in model.modules() if isinstance(m, BaseTunerLayer))
    assert obstacle(layer) == "lora.Conv2d layers have no fused forward"
    forward = type(layer).forward
    accelerate(model)
    assert type(layer).forward is forward
    assert obstacle(layer) == "lora.Conv2d layers have no fused forward"


def test_a_conv1d_base_can_be_fused():
    layers = [m for m in accelerate(pairs.stock("gpt2")).modules() if isinstance(m, BaseTunerLayer)]
    assert {obstacle(layer) for layer in layers} == {None}
    assert {type(layer.base_layer).__name__ for layer in layers} == {"Conv1D"}


@pytest.mark.parametrize(
    "register",
    [
        lambda module: module.register_forward_hook(print),
        lambda module: module.register_forward_pre_hook(print),
        lambda module: module.register_full_backward_hook(print),
        lambda module: module.register_full_backward_pre_hook(print),
        lambda module: setattr(module, "_hf_hook", object()),
        lambda module: module.__dict__.update(forward=print),
    ],
)
def test_every_kind_of_hook_is_detected(register):
    module = nn.Linear(2, 2)
    assert not has_hooks(module)
    register(module)
    assert has_hooks(module)


PARTS = {
    "base weight": lambda layer: (layer.base_layer, "weight"),
    "base bias": lambda layer: (layer.base_layer, "bias"),
    "A": lambda layer: (layer.lora_A["default"], "weight"),
    "B": lambda layer: (layer.lora_B["default"], "weight"),
    "magnitude": lambda layer: (layer.lora_magnitude_vector["default"], "weight"),
}


class Halved(nn.Module):
    """A parametrisation that changes the weight."""

    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize("part", PARTS)
def test_a_part_parametrised_after_a_forward_runs_pefts_code(part, monkeypatch):
    dora = part == "magnitude"
    plain, fused = adapt(nn.Linear(8, 6), use_dora=dora)
    x = torch.randn(3, 8, dtype=torch.float64)
    fused(x)
    for model in (plain, fused):
        parametrize.register_parametrization(*PARTS[part](model.base_model.model[0]), Halved())
    with pairs.counted(monkeypatch) as calls:
        actual = fused(x)
    assert calls == {"peft": 1}
    assert torch.equal(actual, plain(x))
