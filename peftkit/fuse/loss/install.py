"""Makes a causal language model compute its loss from the hidden states.

Two hooks on the model record for each thread that a forward with labels is running. The output head gets a mixin whose forward returns
``LazyLogits`` during such a forward, and transformers' own loss function is called with them. The state of a call is kept per thread
and not on a module, so that threads can share a model.
"""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftkit.fuse.loss.lazy import LazyLogits
from peftkit.fuse.loss.plan import loss_plan, model_reason
from peftkit.fuse.plan import Reason
from peftkit.swap import swap_in, swap_out
from peftkit_kernels.core.checks import is_autocast_enabled
from peftkit_kernels.core.modes import hides_native_calls

_STATE = "_peftkit_logit_free"
_SWAPPING = threading.Lock()


@dataclass(frozen=True)
class _State:
    """The state that is kept on the model while the loss is installed.

    Attributes:
        hook_ids: The ids of the forward pre-hook and the forward hook.
        labels_position: Index of ``labels`` among the positional arguments of the model's forward.
    """

    hook_ids: tuple[int, int]
    labels_position: int


class _Forward(NamedTuple):
    """A running forward of a model.

    Attributes:
        model: A weak reference to the model.
        head: A weak reference to its output head if the forward has labels, otherwise a function that returns ``None``.
        depth: Number of stack frames at its start.
    """

    model: Callable[[], nn.Module | None]
    head: Callable[[], nn.Module | None]
    depth: int


class _Running(threading.local):
    """The running forwards of this thread, the innermost last."""

    def __init__(self):
        self.forwards: list[_Forward] = []


_running = _Running()


class LogitFreeHead:
    """Mixed into the class of an output head. It skips the product with the weight while its model computes a loss."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the head's own forward, or ``LazyLogits``."""
        if not hides_native_calls() and len(args) == 1 and not kwargs:
            model = _model_computing_loss(self)
            plan = None if model is None else loss_plan(model)
            if plan is not None and not isinstance(plan, Reason) and _fits(args[0], plan.weight):
                return LazyLogits.make(args[0], plan)
        return super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


def install_logit_free(model: nn.Module) -> str | None:
    """Let ``model`` compute its training loss without the logits. Its output still has logits; they are computed when they are read.

    Args:
        model: A causal language model of transformers, or a ``PeftModel`` around one.

    Returns:
        ``None`` if a forward with labels computes no logits now, otherwise the reason why it does. If the reason is the model
        itself, nothing is installed. If the reason is the state of its output head, each forward decides again.
    """
    model = _base_model(model)
    reason = model_reason(model)
    if reason is not None:
        return reason
    _mix_in(model.get_output_embeddings())
    if _STATE not in vars(model):
        parameters = list(inspect.signature(type(model).forward).parameters)
        before = model.register_forward_pre_hook(_enter, with_kwargs=True)
        after = model.register_forward_hook(_leave, always_call=True)
        setattr(model, _STATE, _State((before.id, after.id), parameters.index("labels") - 1))
    plan = loss_plan(model)
    return plan if isinstance(plan, Reason) else None


def remove_logit_free(model: nn.Module) -> None:
    """Undo ``install_logit_free``. Does nothing if it is not installed."""
    model = _base_model(model)
    state: _State | None = vars(model).get(_STATE)
    if state is None:
        return
    before, after = state.hook_ids
    del model._forward_pre_hooks[before], model._forward_pre_hooks_with_kwargs[before]
    del model._forward_hooks[after], model._forward_hooks_always_called[after]
    delattr(model, _STATE)
    for module in model.modules():
        if isinstance(module, LogitFreeHead):
            swap_out(module, LogitFreeHead)


def logit_free_status(model: nn.Module) -> tuple[bool, str]:
    """Whether a forward of ``model`` with labels computes its loss without the logits now, and a sentence that explains it."""
    model = _base_model(model)
    plan = loss_plan(model)
    if isinstance(plan, Reason):
        return False, plan
    if _STATE not in vars(model):
        return False, "not installed: logit_free=False, or the model was not wrapped by peftkit"
    sentence = "the loss is computed from the hidden states in chunks; logits are computed only if they are read"
    if plan.lora is not None:
        sentence += "; TRL's SFTTrainer refuses an adapter on the output head, Trainer accepts it"
    return True, sentence


def _base_model(model: Any) -> Any:
    """The model inside ``DistributedDataParallel``, FSDP, ``torch.compile`` and PEFT."""
    while True:
        if isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            return model.get_base_model()
        elif "module" in getattr(model, "_modules", {}) and not hasattr(
            model, "get_output_embeddings"
        ):
            model = model.module
        else:
            return model


def _enter(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Runs before the model's forward; records whether it computes a loss."""
    if torch.compiler.is_compiling():
        return
    depth, forwards = _stack_depth(), _running.forwards
    # An interrupted forward skips the hook after it, because KeyboardInterrupt is no Exception. Forwards that are still running
    # started at a smaller depth.
    while forwards and forwards[-1].depth >= depth:
        forwards.pop()
    state: _State = getattr(model, _STATE)
    labels = kwargs.get("labels", kwargs.get("shift_labels"))
    if labels is None and len(args) > state.labels_position:
        labels = args[state.labels_position]
    head = None if labels is None else model.get_output_embeddings()
    if head is not None:
        _mix_in(head)
    forwards.append(_Forward(weakref.ref(model), weakref.ref(head) if head else _none, depth))


def _leave(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Runs after the model's forward, also if it raised an exception."""
    if torch.compiler.is_compiling():
        return
    forwards = _running.forwards
    for index in reversed(range(len(forwards))):
        if forwards[index].model() is model:
            del forwards[index:]
            return


def _model_computing_loss(head: nn.Module) -> nn.Module | None:
    """The model whose forward with labels is the innermost of this thread, if ``head`` is its output head; otherwise ``None``."""
    forwards = _running.forwards
    if not forwards or forwards[-1].head() is not head:
        return None
    return forwards[-1].model()


def _fits(hidden: Any, weight: Tensor) -> bool:
    """Whether ``hidden`` is a valid input of the head. If not, the head's own forward raises the error."""
    if type(hidden) is not Tensor or type(weight) not in (nn.Parameter, Tensor):
        return False
    if not hidden.dim() or hidden.shape[-1] != weight.shape[1]:
        return False
    if hidden.device != weight.device:
        return False
    return hidden.dtype is weight.dtype or is_autocast_enabled(hidden.device.type)


def _mix_in(head: nn.Module) -> None:
    """Give the output head the forward of ``LogitFreeHead``. Called again in each forward, since a new adapter can replace the head."""
    if not isinstance(head, LogitFreeHead):
        with _SWAPPING:
            if not isinstance(head, LogitFreeHead):
                swap_in(head, LogitFreeHead)


def _stack_depth() -> int:
    frame, depth = sys._getframe(1), 0
    while frame is not None:
        frame, depth = frame.f_back, depth + 1
    return depth


def _none() -> None:
    return None
