"""What the autograd functions of the ops share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


def run(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, without autograd's share of the time where nobody can ask for a gradient.

    Transforms (``torch.func``) and forward-mode tangents go through ``apply``, which refuses what it has no rule for.
    """
    if (
        torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    ):
        return function.apply(*args)
    return function.forward(_NoContext(len(args)), *args)


class _NoContext:
    """Stands in for an autograd function's context: asks for nothing to be kept, and keeps nothing."""

    def __init__(self, count: int):
        self.needs_input_grad = (False,) * count

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Drop them."""

    def set_materialize_grads(self, value: bool) -> None:
        """No gradient will come."""


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward without a derivative of its own: under ``create_graph=True`` its results raise where they are differentiated.

    torch's decorator of that name passes them off as constants where the incoming gradient is one, which would make a
    gradient penalty silently wrong; and it costs microseconds in every other backward.

    Autocast is off inside: the forward has chosen the dtypes, and a backward that runs under autocast must not round its
    float32 products to 16 bits.
    """

    @functools.wraps(backward)
    def call(ctx: Any, *grads: Tensor | None) -> Any:
        device = _device_under_autocast(grads)
        if device is not None:
            with torch.autocast(device, enabled=False):
                return call(ctx, *grads)
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        # a torch.library op has lists of tensors among its arguments
        like = next(grad for grad in tree_leaves(grads) if grad is not None)
        connection = like.new_empty(0, requires_grad=True)
        leaves, structure = tree_flatten(results)
        return tree_unflatten(_Once.apply(_op_name(ctx), connection, *leaves), structure)

    return call


def _device_under_autocast(grads: tuple[Any, ...]) -> str | None:
    """The kind of device that the gradients are on if autocast is on for it."""
    for grad in grads:
        if isinstance(grad, Tensor):
            kind = grad.device.type
            return kind if kind != "meta" and torch.is_autocast_enabled(kind) else None
    return None


def _op_name(ctx: Any) -> str:
    """What to call the op of an autograd function, our own or one torch made for a torch.library op."""
    name = type(ctx).__name__.strip("_").removesuffix("Backward")
    return name.removeprefix("GeneratedBackwardFor_peftkit_").removesuffix("_default")


class _Once(torch.autograd.Function):
    """Passes gradients on and raises where somebody differentiates them."""

    @staticmethod
    def forward(ctx: Any, op: str, connection: Tensor, *grads: Tensor | None) -> Any:
        ctx.op = op
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(
            f"{ctx.op} is once_differentiable: it has no second derivative; use backend='reference', "
            "or peftkit.restore(model) for a whole model"
        )
