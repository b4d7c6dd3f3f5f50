"""May this PEFT LoRA layer run fused? A pure function of the layer's state that returns the reason it may not.

The answer changes only through calls that the fused classes override, so they cache it; what can change without such a call
(dtypes, hooks, gradients of the base weight, autocast) is looked at in every forward.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from peftkit.fuse.storage import int8_obstacle, nf4_obstacle

EXPERT_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate")
"""What transformers' ``use_experts_implementation`` leaves on a class of experts and its instances."""

_LINEAR_4BIT = ("peft.tuners.lora.bnb", "Linear4bit")
_LINEAR_8BIT = ("peft.tuners.lora.bnb", "Linear8bitLt")
"""Module and name of PEFT's classes; importing them would import bitsandbytes."""


def obstacle(layer: nn.Module) -> str | None:
    """Why ``layer`` runs PEFT's own forward in its present state, as a sentence, or ``None`` where it can be fused.

    Args:
        layer: Any PEFT tuner layer, fused class or not.
    """
    return class_obstacle(layer) or state_obstacle(layer) or base_obstacle(layer)


def class_obstacle(layer: Any) -> str | None:
    """What no later call can change: the class of the layer and of what it wraps."""
    from peft.tuners.lora.layer import Linear, ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    stock = getattr(type(layer), "_peftkit_stock", type(layer))
    if stock is ParamWrapper:
        return _parameter_obstacle(layer)
    kind = _kind(layer)
    stored = kind in (_LINEAR_4BIT, _LINEAR_8BIT)
    if not isinstance(layer, Linear) and not stored:
        return f"{kind[0].split('.')[-2]}.{kind[1]} layers have no fused forward"
    if stock is not Linear and not stored:
        return f"{stock.__qualname__} is a subclass of PEFT's Linear with a forward of its own"
    base = layer.base_layer
    if isinstance(base, BaseTunerLayer):
        return f"its base layer is itself a tuner layer ({type(base).__name__})"
    if kind == _LINEAR_4BIT:
        return nf4_obstacle(base)
    if not stored and type(base) not in (nn.Linear, Conv1D):
        return f"its base layer is a {type(base).__name__}, not a plain Linear or Conv1D"
    return None


def _kind(layer: Any) -> tuple[str, str]:
    """Module and name of the class that is PEFT's own."""
    stock = getattr(type(layer), "_peftkit_stock", type(layer))
    return stock.__module__, stock.__name__


def _parameter_obstacle(layer: Any) -> str | None:
    """``class_obstacle`` of a layer around a parameter: experts that transformers dispatches, or the weight of a linear."""
    base, name = layer.get_base_layer(), layer.parameter_name
    if type(base) is nn.Linear:
        alone = layer.base_layer is base and name == "weight"
        return None if alone else f"it adapts {name} of a Linear; only the weight alone is fused"
    if not all(hasattr(base, flag) for flag in EXPERT_FLAGS):
        return (
            f"{name} belongs to a {type(base).__name__}, which is neither a plain Linear nor experts that transformers' "
            "ExpertsInterface computes"
        )
    if name not in ("gate_up_proj", "up_proj", "down_proj") or layer.num_experts < 2:
        return f"{name} of {type(base).__name__} is not a stack of expert weights"
    return None


def state_obstacle(layer: Any) -> str | None:
    """What PEFT's own methods change: adapters, their variants, merging."""
    if layer._disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        return f"adapters are merged into the base weight ({', '.join(layer.merged_adapters)})"
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1:
        return f"{len(active)} adapters are active ({', '.join(active) or 'none'}); exactly one can be fused"
    name = active[0]
    if name in layer.lora_variant and not is_dora(layer, name):
        return f"adapter {name} is a LoRA variant ({type(layer.lora_variant[name]).__name__})"
    if layer.ephemeral_gpu_offload:
        return "its factors are moved to the GPU and back in every forward (ephemeral_gpu_offload)"
    if layer.lora_bias.get(name):
        return f"adapter {name} has a bias of its own (lora_bias=True)"
    if not getattr(layer, "cast_input_dtype_enabled", True):
        return "casting of the input dtype is switched off"
    dropout = layer.lora_dropout[name]
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"adapter {name} uses {type(dropout).__name__} as its dropout"
    for part in ("lora_A", "lora_B"):
        module = getattr(layer, part)[name]
        if type(module) is not nn.Linear:
            return f"{part} of adapter {name} is a {type(module).__name__}, not a plain Linear"
    return None


def base_obstacle(layer: Any) -> str | None:
    """What anyone can change at any time: hooks, offloading, gradients of the base weight."""
    base = layer.get_base_layer()
    own = getattr(layer, "parameter_name", "weight")
    if base._parameters.get(own) is None:
        return "its base weight is computed (parametrised or offloaded), not a parameter"
    if any(parameter.requires_grad for parameter in base.parameters(recurse=False)):
        return "its base layer is trained"
    if _kind(layer) == _LINEAR_8BIT and (reason := int8_obstacle(base)):
        return reason
    name = next(name for name in layer.active_adapters if name in layer.lora_A)
    parts = [
        ("base layer", base),
        ("lora_A", layer.lora_A[name]),
        ("lora_B", layer.lora_B[name]),
        ("dropout", layer.lora_dropout[name]),
    ]
    if is_dora(layer, name):
        magnitude = layer.lora_magnitude_vector[name]
        if keeps_norm(magnitude):
            return (
                "DoraCaching is on: PEFT's own forward keeps the norm from one forward to the next"
            )
        parts.append(("magnitude", magnitude))
    for part, module in parts:
        if has_hooks(module):
            return f"its {part} has hooks"
        if part in ("lora_A", "lora_B") and "weight" not in module._parameters:
            return f"the weight of its {part} is parametrised"
    return None


def is_dora(layer: Any, name: str) -> bool:
    """Whether this adapter is DoRA on a linear layer, as PEFT itself computes it."""
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.tuners.lora.variants import DoraLinearVariant

    if name not in layer.lora_variant:
        return False
    magnitude = layer.lora_magnitude_vector._modules.get(name)
    return (
        type(layer.lora_variant[name]) is DoraLinearVariant and type(magnitude) is DoraLinearLayer
    )


def keeps_norm(magnitude: Any) -> bool:
    """Whether PEFT's forward would take this DoRA's norm from its cache, or put it there."""
    from peft.tuners.lora import dora

    return dora.ENABLE_DORA_CACHING and not magnitude.training


def method(layer: Any) -> str:
    """``"DoRA"`` for a LoRA layer of PEFT that has a DoRA among its active adapters, otherwise ``"LoRA"``."""
    return "DoRA" if any(layer.use_dora.get(name) for name in layer.active_adapters) else "LoRA"


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` would run anything besides its class's forward."""
    state = (
        module.__dict__
    )  # asked for dozens of times a decoder layer: attributes would cost twice the time
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or "_hf_hook" in state
    )
