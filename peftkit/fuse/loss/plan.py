"""Decides whether a forward with labels computes its loss without the logits, and gives the reason if not."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from peftkit.fuse.loss.head import Head
from peftkit.fuse.plan import Reason
from peftkit_kernels.core.launch import on_gpu
from peftkit_kernels.core.modes import hides_native_calls
from peftkit_kernels.low_rank import LoRA

_OWN_FORWARDS = {nn.Linear: nn.Linear.forward, LoraLinear: LoraLinear.forward}
"""The forwards that ``Head`` can replace, as they were when this module was imported."""


_WATCHED = Reason("something records or observes torch operations, such as FlopCounterMode")


def loss_plan(model: Any) -> Head | Reason:
    """The tensors of the output head of ``model``, or why a forward with labels computes its logits.

    Args:
        model: A causal language model of transformers, without a ``PeftModel`` around it.
    """
    if hides_native_calls():
        return _WATCHED
    reason = model_reason(model)
    return _head_plan(model.get_output_embeddings()) if reason is None else reason


def model_reason(model: Any) -> Reason | None:
    """Why ``model`` computes its logits in any state of its output head, or ``None``."""
    reason = _class_reason(type(model)) or _forward_reason(model)
    if reason is not None:
        return reason
    if model.get_output_embeddings() is None:
        return Reason(f"{type(model).__name__} has no output embeddings")
    loss = model.loss_function
    if loss is not ForCausalLMLoss:
        name = getattr(loss, "__name__", loss)
        return Reason(f"the loss function is {name!r}, not transformers' ForCausalLMLoss")
    return None


@functools.cache
def _class_reason(cls: type) -> Reason | None:
    """Why no model of this class can compute its loss without logits, or ``None``."""
    name = cls.__name__
    if not callable(getattr(cls, "get_output_embeddings", None)):
        return Reason(f"{name} is not a transformers model with an output head")
    if not _calls_loss_function(cls):
        return Reason(f"{name} does not compute its loss by self.loss_function(logits, labels)")
    if "labels" not in inspect.signature(cls.forward).parameters:
        return Reason(f"the forward of {name} takes no labels")
    return None


def _calls_loss_function(cls: type) -> bool:
    """Whether the forward of ``cls``, or the parent's forward that it calls with ``super()``, uses ``loss_function``."""
    for parent in cls.__mro__:
        if "forward" not in vars(parent):
            continue
        names = _names_in(vars(parent)["forward"])
        if "loss_function" in names:
            return True
        if "super" not in names:
            return False
    return False


def _names_in(function: Any) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return () if code is None else code.co_names


def _forward_reason(model: nn.Module) -> Reason | None:
    """Why a forward that was set on this one model may compute the loss differently from its class, or ``None``."""
    forward: Any = vars(model).get("forward")
    if forward is None:
        return None
    home = getattr(getattr(forward, "__func__", forward), "__globals__", {}).get("__name__", "")
    if home.partition(".")[0] == "trl":
        return Reason(
            "TRL's trainers compute the loss with an output head of their own, which computes large tiles of the logits; "
            "peftkit's loss is not used there"
        )
    if "loss_function" in _names_in(forward):
        return None
    return Reason(f"the forward of this {type(model).__name__} was replaced by another function")


def _head_plan(head: nn.Module) -> Head | Reason:
    if _does_more_than_its_class(head):
        return Reason("the output head has hooks or a replaced forward")
    if isinstance(head, ModulesToSaveWrapper):
        saved, active = head.modules_to_save, head.active_adapters
        if head.disable_adapters or not active or any(name not in saved for name in active):
            return _head_plan(head.original_module)
        return _head_plan(saved[active[0]])
    cls = _forward_class(head)
    if cls not in _OWN_FORWARDS:
        return Reason(f"the output head is a {type(head).__name__}, not a plain linear layer")
    if vars(cls)["forward"] is not _OWN_FORWARDS[cls]:
        return Reason(f"{cls.__name__}.forward was replaced")
    return _lora_plan(head) if isinstance(head, LoraLinear) else _linear_plan(head)


def _forward_class(module: nn.Module) -> type:
    """The class whose forward runs, without the classes that peftkit has mixed in."""
    return next(
        cls
        for cls in type(module).__mro__
        if "forward" in vars(cls) and cls.__module__.partition(".")[0] != "peftkit"
    )


def _linear_plan(head: Any) -> Head | Reason:
    kind = type(head.weight)
    # The head has no hooks, so only FSDP can have sharded the weight. FSDP gathers the weight for each forward.
    sharded = kind.__module__.startswith("torch.distributed.tensor")
    if kind not in (nn.Parameter, Tensor) and not sharded:
        return Reason(f"the weight of the output head is a {kind.__name__}")
    if head.weight.is_meta and not on_gpu(head.weight.device):
        return Reason("the output head is on the meta device, where no loss has a value")
    return Head(head.weight, head.bias, None)


def _lora_plan(head: Any) -> Head | Reason:
    """The tensors of a head with a LoRA layer, by the same conditions as in PEFT's ``LoraLinear.forward``."""
    base = _head_plan(head.base_layer)
    if isinstance(base, Reason):
        return base
    base = base._replace(layer=head)
    if head.disable_adapters:
        if head.merged:
            return Reason(
                "the adapters of the output head are disabled but still merged; PEFT's forward unmerges them"
            )
        return base
    if head.merged:
        return base
    active = [name for name in head.active_adapters if name in head.lora_A]
    if not active:
        return base
    if len(active) > 1:
        return Reason(f"the output head has {len(active)} active adapters")
    (name,) = active
    A, B, dropout = head.lora_A[name], head.lora_B[name], head.lora_dropout[name]
    if name in head.lora_variant:
        variant = type(head.lora_variant[name]).__name__
        return Reason(f"the adapter on the output head is a {variant}")
    if any(map(_does_more_than_its_class, (A, B, dropout))):
        return Reason("the adapter on the output head has hooks or a replaced forward")
    if _forward_class(A) is not nn.Linear or _forward_class(B) is not nn.Linear:
        return Reason("the adapter on the output head is not two plain linear layers")
    if A.bias is not None or B.bias is not None:
        return Reason("the adapter on the output head is not two linear layers without bias")
    if isinstance(dropout, nn.Dropout):
        if dropout.training and dropout.p > 0:
            return Reason(f"the adapter on the output head has dropout {dropout.p}")
    elif type(dropout) is not nn.Identity:
        kind = type(dropout).__name__
        return Reason(f"the adapter on the output head has a {kind} as its dropout")
    if not head.cast_input_dtype_enabled:
        return Reason("casting of the input is switched off on the output head")
    return base._replace(lora=LoRA(A.weight, B.weight, float(head.scaling[name])))


def _does_more_than_its_class(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs more than the forward of its class: hooks, or a forward set on this one module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )
