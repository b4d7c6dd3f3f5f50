"""The adapter that a PEFT LoRA layer computes in its present state, or the reason why it cannot be fused.

``find_adapter`` finds the modules of the adapter once. ``current_adapter`` caches them on the layer and checks in each forward that they
are still the same objects. ``changed_reason`` checks in each forward what else can change by a plain assignment.
"""

from __future__ import annotations

import os
import sys
import types
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import nn

from peftkit.find.stacks import packed_stacks
from peftkit.fp8 import Float8Linear
from peftkit.fuse.plan import NotReached, Reason
from peftkit.fuse.storage import nf4_obstacle
from peftkit.swap import own_class

EXPERT_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate")
"""Attributes that transformers' ``use_experts_implementation`` sets on a class of experts and its instances."""

_LINEAR_4BIT = ("peft.tuners.lora.bnb", "Linear4bit")
_LINEAR_8BIT = ("peft.tuners.lora.bnb", "Linear8bitLt")
"""PEFT's classes by module and name, because importing them would import bitsandbytes."""

_FOUND = "_peftkit_found"

NONE_ACTIVE = NotReached("no active adapter has weights in it")
_DISABLED = Reason("adapters are disabled")
_NO_CAST = Reason("casting of the input dtype is switched off")
_COMPUTED = Reason("its base weight is computed (parametrised or offloaded), not a parameter")
_CACHING = Reason(
    "DoraCaching is on: PEFT's own forward keeps the norm from one forward to the next"
)
_REPLACED = Reason(
    "a function of torch that PEFT's forward calls was replaced (nn.Linear or dropout)"
)


class Adapter(NamedTuple):
    """The modules that one forward of a LoRA layer needs.

    Attributes:
        active: The active adapters of the model when the modules were found.
        name: The active adapter that has weights in this layer.
        base: The frozen linear.
        base_forward: The forward of its class when it was found.
        A: The module that holds ``lora_A``.
        B: The module that holds ``lora_B``.
        dropout: ``nn.Dropout`` or ``nn.Identity``.
        magnitude: PEFT's DoRA module, or ``None``.
    """

    active: Any
    name: str
    base: Any
    base_forward: Any
    A: nn.Module
    B: nn.Module
    dropout: nn.Module
    magnitude: Any


def class_reason(layer: Any) -> Reason | None:
    """Why this layer can never be fused: because of its class, or the class of the module that it wraps."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import Linear, ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    if not isinstance(layer, LoraLayer):
        return Reason(f"{method(layer)} has no fused forward")
    stock = own_class(layer)
    if stock is ParamWrapper:
        return _parameter_reason(layer)
    kind = (stock.__module__, stock.__name__)
    stored = kind in (_LINEAR_4BIT, _LINEAR_8BIT)
    if not issubclass(stock, Linear) and not stored:
        return Reason(f"{kind[0].split('.')[-2]}.{kind[1]} layers have no fused forward")
    if stock is not Linear and not stored:
        return Reason(
            f"{stock.__qualname__} is a subclass of PEFT's Linear with a forward of its own"
        )
    base = layer.base_layer
    if isinstance(base, BaseTunerLayer):
        return Reason(f"its base layer is itself a tuner layer ({type(base).__name__})")
    if kind == _LINEAR_4BIT:
        return nf4_obstacle(base)
    if not stored and type(base) not in (nn.Linear, Conv1D, Float8Linear):
        return Reason(f"its base layer is a {type(base).__name__}, not a plain Linear or Conv1D")
    return None


def _parameter_reason(layer: Any) -> Reason | None:
    """``class_reason`` for a layer that adapts a parameter: a stack of expert weights, or the weight of a linear."""
    base, name = layer.get_base_layer(), layer.parameter_name
    if type(base) is nn.Linear:
        alone = layer.base_layer is base and name == "weight"
        return (
            None
            if alone
            else Reason(f"it adapts {name} of a Linear; only the weight alone is fused")
        )
    if not all(hasattr(base, flag) for flag in EXPERT_FLAGS):
        return Reason(
            f"{name} belongs to a {type(base).__name__}, which is neither a plain Linear nor experts that transformers' "
            "ExpertsInterface computes"
        )
    if name not in ("gate_up_proj", "up_proj", "down_proj") or layer.num_experts < 2:
        return Reason(f"{name} of {type(base).__name__} is not a stack of expert weights")
    return None


def current_adapter(layer: Any, base: nn.Module) -> Adapter | Reason:
    """The modules of the active adapter, cached on the layer until one is replaced, or the reason why they cannot be fused.

    Args:
        layer: The LoRA layer.
        base: The module that it wraps now.
    """
    state = layer.__dict__
    found = state.get(_FOUND)
    if found is None or found.base is not base or not _is_current(layer, found):
        found = find_adapter(layer)
        if isinstance(found, Reason):
            state.pop(_FOUND, None)
        else:
            state[_FOUND] = found
    return found


def find_adapter(layer: Any) -> Adapter | Reason:
    """Find the active adapter of a layer and its modules, or the reason why they cannot be fused."""
    reason = class_reason(layer)
    if reason is not None:
        return reason
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if not active:
        return NONE_ACTIVE
    if len(active) > 1:
        return Reason(
            f"{len(active)} adapters are active ({', '.join(active)}); exactly one can be fused"
        )
    name = active[0]
    if name in layer.lora_variant and not is_dora(layer, name):
        return Reason(
            f"adapter {name} is a LoRA variant ({type(layer.lora_variant[name]).__name__})"
        )
    if layer.ephemeral_gpu_offload:
        return Reason(
            "its factors are moved to the GPU and back in every forward (ephemeral_gpu_offload)"
        )
    dropout = layer.lora_dropout[name]
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return Reason(f"adapter {name} uses {type(dropout).__name__} as its dropout")
    for part in ("lora_A", "lora_B"):
        module = getattr(layer, part)[name]
        if type(module) is not nn.Linear:
            return Reason(
                f"{part} of adapter {name} is a {type(module).__name__}, not a plain Linear"
            )
    base = layer.get_base_layer()
    if not is_own_function(type(base), "forward"):
        return Reason(f"the forward of {type(base).__name__}, its base layer, was replaced")
    if not isinstance(F.linear, types.BuiltinFunctionType):
        return _REPLACED
    if not is_own_function(own_class(layer), "forward"):
        return Reason(f"the forward of PEFT's {own_class(layer).__name__} was replaced")
    return Adapter(
        layer._active_adapter
        if isinstance(layer._active_adapter, str)
        else list(layer._active_adapter),
        name,
        base,
        type(base).forward,
        layer.lora_A[name],
        layer.lora_B[name],
        dropout,
        layer.lora_magnitude_vector[name] if is_dora(layer, name) else None,
    )


def _is_current(layer: Any, found: Adapter) -> bool:
    """Whether these are still the active adapter and the modules of the layer."""
    if found.active != layer.__dict__["_active_adapter"]:
        return False
    modules, name = layer._modules, found.name
    return (
        modules["lora_A"]._modules.get(name) is found.A
        and modules["lora_B"]._modules.get(name) is found.B
        and modules["lora_dropout"]._modules.get(name) is found.dropout
        and modules["lora_magnitude_vector"]._modules.get(name) is found.magnitude
        and type(found.base).forward is found.base_forward
    )


def changed_reason(layer: Any, found: Adapter) -> Reason | None:
    """Why the layer runs PEFT's own forward now, because of a state that can change without a call of PEFT."""
    state = layer.__dict__
    if state["_disable_adapters"]:
        return _DISABLED
    if state["merged_adapters"]:
        return Reason(
            f"adapters are merged into the base weight ({', '.join(state['merged_adapters'])})"
        )
    if not state.get("cast_input_dtype_enabled", True):
        return _NO_CAST
    _, name, base, _, A, B, dropout, magnitude = found
    if state["lora_bias"].get(name):
        return Reason(f"adapter {name} has a bias of its own (lora_bias=True)")
    if has_foreign_hooks(base) or has_hooks(A) or has_hooks(B) or has_hooks(dropout):
        return _hooked(found)
    if magnitude is not None:
        if has_hooks(magnitude):
            return _hooked(found)
        if keeps_norm(magnitude):
            return _CACHING
        if "weight" not in magnitude._parameters:
            return Reason("the weight of its magnitude is parametrised")
    if "weight" not in A._parameters or "weight" not in B._parameters:
        part = "lora_B" if "weight" in A._parameters else "lora_A"
        return Reason(f"the weight of its {part} is parametrised")
    if (nn.Linear.forward, nn.Dropout.forward, F.linear, F.dropout) != _CALLED:
        return _REPLACED
    return None


def weight_reason(base: nn.Module, name: str = "weight") -> Reason | None:
    """Why the frozen weight of a base layer cannot be read: it is computed in each forward, or trained."""
    if base._parameters.get(name) is None:
        return _COMPUTED
    for parameter in base._parameters.values():
        if parameter is not None and parameter.requires_grad:
            return Reason("its base layer is trained")
    return None


def _hooked(found: Adapter) -> Reason:
    parts = {
        "base layer": found.base,
        "lora_A": found.A,
        "lora_B": found.B,
        "dropout": found.dropout,
        "magnitude": found.magnitude,
    }
    part = next(part for part, module in parts.items() if module is not None and has_hooks(module))
    return Reason(f"its {part} has hooks")


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
    """Whether PEFT's forward would read this DoRA's norm from its cache, or store it there."""
    from peft.tuners.lora import dora

    return dora.ENABLE_DORA_CACHING and not magnitude.training


def method(layer: Any) -> str:
    """The method of a PEFT tuner layer: ``"LoRA"``, ``"DoRA"`` if an active adapter is one, ``"IA3"`` ..."""
    from peft.tuners.lora import LoraLayer

    if isinstance(layer, LoraLayer):
        return "DoRA" if any(layer.use_dora.get(name) for name in layer.active_adapters) else "LoRA"
    # PEFT has a package for each method, named after the method.
    homes = (cls.__module__ for cls in type(layer).__mro__)
    return next(home for home in homes if home.startswith("peft.tuners.")).split(".")[2].upper()


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` would run anything besides its class's forward."""
    # This runs dozens of times in each decoder layer, and attribute access would take twice as long.
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or "_hf_hook" in state
    )


def has_foreign_hooks(base: nn.Module) -> bool:
    """``has_hooks``, without those by which bitsandbytes decodes the stacks of experts once in each forward."""
    if not has_hooks(base):
        return False
    if not packed_stacks(base):
        return True
    state = base.__dict__
    own = "bitsandbytes.nn.parametrize"
    hooks = [*state["_forward_pre_hooks"].values(), *state["_forward_hooks"].values()]
    return bool(
        any(getattr(hook, "__module__", None) != own for hook in hooks)
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or "_hf_hook" in state
    )


def is_own_function(cls: type, name: str) -> bool:
    """Whether the code of a method is in the package that defines the class, so that nobody has replaced the method."""
    for parent in cls.__mro__:
        if name not in vars(parent):
            continue
        home = sys.modules.get(parent.__module__.partition(".")[0])
        code = getattr(vars(parent)[name], "__code__", None)
        if code is None or home is None:
            return False
        return code.co_filename == getattr(home, "__file__", None) or any(
            code.co_filename.startswith(f"{folder}{os.sep}")
            for folder in getattr(home, "__path__", ())
        )
    return False


_CALLED = (nn.Linear.forward, nn.Dropout.forward, F.linear, F.dropout)
"""The functions of torch that PEFT's forward calls, as they were when peftkit was imported."""
