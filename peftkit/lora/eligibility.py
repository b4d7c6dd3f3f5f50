"""May this PEFT LoRA layer run fused? A pure function of the layer's state that returns the reason it may not.

The answer changes only through calls that the fused classes override, so they cache it; what can change without such a call
(dtypes, hooks, gradients of the base weight, autocast) is looked at in every forward.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def obstacle(layer: nn.Module) -> str | None:
    """Why ``layer`` runs PEFT's own forward in its present state, as a sentence, or ``None`` where it can be fused.

    Args:
        layer: Any PEFT tuner layer, fused class or not.
    """
    return class_obstacle(layer) or state_obstacle(layer) or base_obstacle(layer)


def class_obstacle(layer: Any) -> str | None:
    """What no later call can change: the class of the layer and of what it wraps."""
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    if not isinstance(layer, Linear):
        return f"{type(layer).__module__.split('.')[-2]}.{type(layer).__name__} layers have no fused forward"
    stock = type(layer) is Linear or getattr(type(layer), "_peftkit_fused", False)
    if not stock:
        return (
            f"{type(layer).__qualname__} is a subclass of PEFT's Linear with a forward of its own"
        )
    base = layer.base_layer
    if isinstance(base, BaseTunerLayer):
        return f"its base layer is itself a tuner layer ({type(base).__name__})"
    if type(base) not in (nn.Linear, Conv1D):
        return f"its base layer is a {type(base).__name__}, not a plain Linear or Conv1D"
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
    if name in layer.lora_variant:
        return f"adapter {name} is a LoRA variant ({type(layer.lora_variant[name]).__name__})"
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
    base = layer.base_layer
    if base._parameters.get("weight") is None:
        return "its base weight is computed (parametrised or offloaded), not a parameter"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "its base layer is trained"
    name = next(name for name in layer.active_adapters if name in layer.lora_A)
    for part, module in (
        ("base layer", base),
        ("lora_A", layer.lora_A[name]),
        ("lora_B", layer.lora_B[name]),
        ("dropout", layer.lora_dropout[name]),
    ):
        if has_hooks(module):
            return f"its {part} has hooks"
        if part != "dropout" and "weight" not in module._parameters:
            return f"the weight of its {part} is parametrised"
    return None


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
