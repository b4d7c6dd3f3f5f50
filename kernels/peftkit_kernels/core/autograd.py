"""Helpers that all autograd functions of the ops use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from peftkit_kernels.core.modes import is_transformed
from peftkit_kernels.core.namespace import library_name


def run(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``. If gradients are disabled, autograd is skipped to save time.

    Transforms (``torch.func``) and forward-mode tangents go through ``apply``, which refuses functions it has no rule for.
    """
    if torch.is_grad_enabled() or is_transformed():
        return function.apply(*args)
    return function.forward(_NoContext(len(args)), *args)


class _NoContext:
    """Replaces the context of an autograd function: no input needs a gradient, and nothing is kept."""

    def __init__(self, count: int):
        self.needs_input_grad = (False,) * count

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Save nothing: there is no backward."""

    def set_materialize_grads(self, value: bool) -> None:
        """Do nothing: there is no backward."""


def gradients_of(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of ``function(*tensors)`` with respect to ``tensors``: autograd calls the function once more.

    Args:
        function: Consists of torch operations.
        tensors: Its arguments, floating point. They are not changed.
        grad: The gradient with respect to the function's result.
    """
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(function(*leaves), leaves, grad)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward without a derivative: with ``create_graph=True``, differentiating its results raises an error.

    torch's decorator of the same name treats the results as constants if the incoming gradient is a constant, which would
    make a gradient penalty silently wrong. It also costs microseconds in every other backward.

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
        # the gradients of a torch.library op may be lists of tensors
        like = next(grad for grad in tree_leaves(grads) if grad is not None)
        connection = like.new_empty(0, requires_grad=True)
        leaves, structure = tree_flatten(results)
        return tree_unflatten(_Once.apply(_op_name(ctx), connection, *leaves), structure)

    return call


def _device_under_autocast(grads: tuple[Any, ...]) -> str | None:
    """The device type of the gradients if autocast is on for that type, else ``None``."""
    for grad in grads:
        if isinstance(grad, Tensor):
            kind = grad.device.type
            return kind if kind != "meta" and torch.is_autocast_enabled(kind) else None
    return None


def _op_name(ctx: Any) -> str:
    """The name of the op of an autograd function: one of this package, or one that torch generated for a torch.library op."""
    name = type(ctx).__name__.strip("_").removesuffix("Backward")
    generated = "GeneratedBackwardFor_" + library_name("").replace("::", "_")
    return name.removeprefix(generated).removesuffix("_default")


class _Once(torch.autograd.Function):
    """Returns the gradients unchanged and raises an error if they are differentiated."""

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
