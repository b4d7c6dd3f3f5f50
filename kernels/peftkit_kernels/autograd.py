"""What the autograd functions of the ops share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward without a derivative of its own: under ``create_graph=True`` its results raise where they are differentiated.

    torch's decorator of that name passes them off as constants where the incoming gradient is one, which would make a
    gradient penalty silently wrong; and it costs microseconds in every other backward.
    """

    @functools.wraps(backward)
    def call(ctx: Any, *grads: Tensor | None) -> Any:
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
