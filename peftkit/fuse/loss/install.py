"""Making a causal language model compute its loss from the hidden states.

Two hooks on the model are all that is installed. While its forward runs with labels they give the output head and
``loss_function`` a stand-in: the head returns ``LazyLogits``, and the loss is computed from those by
``linear_cross_entropy``, in chunks. Outside such a forward nothing differs from before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from peftkit.fuse.loss.lazy import HeadTensors, LazyLogits
from peftkit_kernels.dispatch import is_transformed
from peftkit_kernels.linear_cross_entropy import linear_cross_entropy
from peftkit_kernels.low_rank import LoRA

_STATE = "_peftkit_logit_free"


@dataclass
class _State:
    """Kept on the model while installed.

    Attributes:
        hook_ids: Of the forward pre-hook and the forward hook.
        labels_position: Index of ``labels`` among the positional arguments of the model's forward.
        swapped_head: The output head whose forward is replaced at the moment.
        former_loss: The ``_loss_function`` entry of the model before it was replaced; empty where there was none.
    """

    hook_ids: tuple[int, int]
    labels_position: int
    swapped_head: nn.Module | None = None
    former_loss: tuple[Any, ...] = ()


def install_logit_free(model: nn.Module) -> str | None:
    """Let ``model`` train without forming its logits; they stay readable in its output, computed on demand.

    Args:
        model: A causal language model of transformers, or a ``PeftModel`` around one.

    Returns:
        ``None`` when installed (or installed before), otherwise the reason why this model cannot be.
    """
    model = _base_model(model)
    if _STATE in vars(model):
        return None
    obstacle = _obstacle(model)
    if obstacle is not None:
        return obstacle
    parameters = list(inspect.signature(type(model).forward).parameters)
    before = model.register_forward_pre_hook(_swap_in, with_kwargs=True)
    after = model.register_forward_hook(_swap_out, always_call=True)
    setattr(model, _STATE, _State((before.id, after.id), parameters.index("labels") - 1))
    return None


def remove_logit_free(model: nn.Module) -> None:
    """Undo ``install_logit_free``; without effect on a model where it is not installed."""
    model = _base_model(model)
    state: _State | None = vars(model).get(_STATE)
    if state is None:
        return
    _restore(model, state)
    before, after = state.hook_ids
    del model._forward_pre_hooks[before], model._forward_pre_hooks_with_kwargs[before]
    del model._forward_hooks[after], model._forward_hooks_always_called[after]
    delattr(model, _STATE)


def logit_free_status(model: nn.Module) -> tuple[bool, str]:
    """Whether a forward of ``model`` with labels leaves its logits out now, and a sentence saying so or why not."""
    model = _base_model(model)
    obstacle = _obstacle(model)
    if obstacle is not None:
        return False, obstacle
    if _STATE not in vars(model):
        return False, "not installed: logit_free=False, or the model was not wrapped by peftkit"
    return (
        True,
        "the loss is computed from the hidden states in chunks; logits only where they are read",
    )


def _base_model(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _obstacle(model: Any) -> str | None:
    """Why the loss of ``model`` cannot be computed from its hidden states, or ``None``."""
    name = type(model).__name__
    if not callable(getattr(model, "get_output_embeddings", None)):
        return f"{name} is not a transformers model with an output head"
    if not _calls_loss_function(type(model)):
        return f"{name} does not compute its loss by self.loss_function(logits, labels)"
    if "labels" not in inspect.signature(type(model).forward).parameters:
        return f"the forward of {name} takes no labels"
    return _obstacle_now(model)


def _obstacle_now(model: Any) -> str | None:
    """The part of ``_obstacle`` that can change from one forward to the next."""
    head = model.get_output_embeddings()
    if head is None:
        return f"{type(model).__name__} has no output embeddings"
    loss = model.loss_function
    if loss is not ForCausalLMLoss:
        return f"the loss function is {getattr(loss, '__name__', loss)!r}, not transformers' ForCausalLMLoss"
    tensors = _resolve_head(head)
    return tensors if isinstance(tensors, str) else None


def _calls_loss_function(cls: type) -> bool:
    """Whether the forward that ``cls`` runs mentions ``loss_function``, itself or in the parent it defers to."""
    for parent in cls.__mro__:
        forward = vars(parent).get("forward")
        if forward is None:
            continue
        code = getattr(inspect.unwrap(forward), "__code__", None)
        if code is None:
            return False
        if "loss_function" in code.co_names:
            return True
        if "super" not in code.co_names:
            return False
    return False


def _resolve_head(head: nn.Module) -> HeadTensors | str:
    """The tensors ``head`` computes with at the moment, or why it must run its own forward."""
    if _runs_more_than_its_class(head):
        return "the output head carries hooks or a replaced forward"
    if isinstance(head, ModulesToSaveWrapper):
        saved = head.modules_to_save
        active = list(head.active_adapters)
        if head.disable_adapters or any(adapter not in saved for adapter in active) or not active:
            return _resolve_head(head.original_module)
        return _resolve_head(saved[active[0]])
    if type(head) is nn.Linear:
        if type(head.weight) not in (nn.Parameter, Tensor):
            return f"the weight of the output head is a {type(head.weight).__name__}"
        return HeadTensors(head.weight, head.bias, None)
    if isinstance(head, LoraLinear):
        return _resolve_lora_head(head)
    return f"the output head is a {type(head).__name__}, not a plain linear layer"


def _resolve_lora_head(head: LoraLinear) -> HeadTensors | str:
    """As ``_resolve_head``, for a LoRA layer of PEFT."""
    base = _resolve_head(head.base_layer)
    if isinstance(base, str) or (head.merged and not head.disable_adapters):
        return base
    if head.disable_adapters:
        return "the output head has to be unmerged first" if head.merged else base
    active = [name for name in head.active_adapters if name in head.lora_A]
    if not active:
        return base
    if len(active) > 1:
        return f"the output head has {len(active)} active adapters"
    (name,) = active
    A, B, dropout = head.lora_A[name], head.lora_B[name], head.lora_dropout[name]
    if name in head.lora_variant:
        return f"the adapter on the output head is a {type(head.lora_variant[name]).__name__}"
    if type(A) is not nn.Linear or type(B) is not nn.Linear or B.bias is not None:
        return "the adapter on the output head is not two plain linear layers without bias"
    if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0:
        return f"the adapter on the output head has dropout {dropout.p}"
    if any(map(_runs_more_than_its_class, (A, B, dropout))):
        return "the adapter on the output head carries hooks"
    if not head.cast_input_dtype_enabled:
        return "casting of the input is switched off on the output head"
    return base._replace(lora=LoRA(A.weight, B.weight, float(head.scaling[name])))


class _StandIn(functools.partial):
    """What replaces a forward or a loss function for the time of one forward of the model."""


def _runs_more_than_its_class(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than the forward of its class: hooks, or a forward somebody put on it."""
    forward = vars(module).get("forward")
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or not (forward is None or isinstance(forward, _StandIn))
    )


def _swap_in(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the forward: put the stand-ins in place if there are labels."""
    if is_transformed():
        return
    state: _State = getattr(model, _STATE)
    # An interrupted forward (Ctrl-C is no Exception) skips the hook after it.
    _restore(model, state)
    labels = kwargs.get("labels", kwargs.get("shift_labels"))
    if labels is None and len(args) > state.labels_position:
        labels = args[state.labels_position]
    if labels is None or _obstacle_now(model) is not None:
        return
    head = model.get_output_embeddings()
    vars(head)["forward"] = _StandIn(_lazy_forward, head)
    state.swapped_head = head
    original: Callable[..., Tensor] = model.loss_function
    if "_loss_function" in vars(model):
        state.former_loss = (vars(model)["_loss_function"],)
    model.loss_function = _StandIn(_loss, original)


def _swap_out(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """After the forward, also when it raised."""
    if not torch.compiler.is_compiling():
        _restore(model, getattr(model, _STATE))


def _restore(model: nn.Module, state: _State) -> None:
    if state.swapped_head is None:
        return
    del vars(state.swapped_head)["forward"]
    del vars(model)["_loss_function"]
    if state.former_loss:
        vars(model)["_loss_function"] = state.former_loss[0]
    state.swapped_head, state.former_loss = None, ()


def _lazy_forward(head: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The output head's forward while the model computes its loss."""
    tensors = _resolve_head(head)
    if isinstance(tensors, str) or args or kwargs:
        return type(head).forward(head, hidden, *args, **kwargs)
    return LazyLogits.make(hidden, tensors)


def _loss(
    original: Callable[..., Tensor],
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """As ``ForCausalLMLoss``, from the hidden states where ``logits`` are not computed yet."""
    row_loss = logits.row_loss() if isinstance(logits, LazyLogits) else None
    if not isinstance(logits, LazyLogits) or row_loss is None or logits.shape[-1] != vocab_size:
        return original(
            logits,
            labels,
            vocab_size,
            num_items_in_batch=num_items_in_batch,
            ignore_index=ignore_index,
            shift_labels=shift_labels,
            **kwargs,
        )
    hidden, head = logits.hidden, logits.head
    target = labels if shift_labels is None else shift_labels.reshape(hidden.shape[:-1])
    return linear_cross_entropy(
        hidden,
        head.weight,
        target.to(hidden.device),
        bias=head.bias,
        lora=head.lora,
        ignore_index=ignore_index,
        softcap=row_loss.softcap,
        logit_scale=row_loss.logit_scale,
        shift=shift_labels is None,
        num_items=num_items_in_batch,
        compute_dtype=logits.compute_dtype,
    )
