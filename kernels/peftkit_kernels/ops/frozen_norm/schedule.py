"""A norm with a frozen weight: the schedule of ``frozen_rms_norm`` and ``frozen_layer_norm``.

RMSNorm, with ``r = rsqrt(mean(x²) + eps)`` and ``u = dy ∘ (offset + w)``: ``dx = r (u - x r² mean(u ∘ x))``.

LayerNorm, with ``n = (x - mean) r``, ``r = rsqrt(var + eps)`` and ``u = dy ∘ w``: ``dx = r (u - mean(u) - n mean(u ∘ n))``.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from torch import Tensor

from peftkit_kernels.core.schedule import Schedule
from peftkit_kernels.ops.frozen_norm.passes import layer_like, rms_like
from peftkit_kernels.ops.frozen_norm.torch_passes import TorchPasses
from peftkit_kernels.ops.frozen_norm.triton_passes import TritonPasses

Passes = TorchPasses | TritonPasses


class RMSNorm(NamedTuple):
    """The arguments of ``frozen_rms_norm``."""

    x: Tensor
    weight: Tensor
    eps: float
    offset: float
    round_first: bool


class LayerNorm(NamedTuple):
    """The arguments of ``frozen_layer_norm``."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    eps: float


class Made(NamedTuple):
    """The statistics of each row. RMSNorm has no mean."""

    mean: Tensor | None
    rstd: Tensor


class Kept(NamedTuple):
    """What the backward needs."""

    x: Tensor
    weight: Tensor
    offset: float
    made: Made


class Grads(NamedTuple):
    """The tensor that may need a gradient, its gradient, or whether it is needed."""

    x: Any


def forward(P: Passes, call: RMSNorm | LayerNorm) -> tuple[Tensor, Made]:
    """The normalised rows and their statistics."""
    if isinstance(call, LayerNorm):
        y, mean, rstd = P.layer_norm(*call)
        return y, Made(mean, rstd)
    y, rstd = P.rms_norm(*call)
    return y, Made(None, rstd)


def trained(call: RMSNorm | LayerNorm) -> Grads:
    """The input."""
    return Grads(call.x)


def keep(call: RMSNorm | LayerNorm, y: Tensor, made: Made, needs: Grads) -> Kept:
    """What the backward needs."""
    offset = 0.0 if isinstance(call, LayerNorm) else call.offset
    return Kept(call.x, call.weight, offset, made)


def backward(P: Passes, kept: Kept, dy: Tensor, needs: Grads) -> Grads:
    """The gradient of the input, by the formulas of this module."""
    mean, rstd = kept.made
    return Grads(P.grad_x(dy, kept.x, kept.weight, mean, rstd, kept.offset))


def like(call: RMSNorm | LayerNorm) -> tuple[Tensor, Made]:
    """Uninitialised results of ``forward``."""
    if isinstance(call, LayerNorm):
        y, mean, rstd = layer_like(call.x)
        return y, Made(mean, rstd)
    y, rstd = rms_like(call.x, call.weight, call.round_first)
    return y, Made(None, rstd)


def like_grads(kept: Kept, dy: Tensor, needs: Grads) -> Grads:
    """Uninitialised results of ``backward``."""
    return Grads(kept.x.new_empty(kept.x.shape))


_declare = functools.partial(
    Schedule,
    torch_passes=TorchPasses,
    triton_passes=TritonPasses,
    forward=forward,
    keep=keep,
    backward=backward,
    trained=trained,
    like=like,
    like_grads=like_grads,
    tuples=(RMSNorm, LayerNorm, Made, Kept, Grads),
)
frozen_rms_norm = _declare("frozen_rms_norm")
frozen_layer_norm = _declare("frozen_layer_norm")
