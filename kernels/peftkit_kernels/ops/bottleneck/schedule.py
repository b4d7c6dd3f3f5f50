"""A bottleneck adapter: the schedule of ``bottleneck``.

With ``z = h downᵀ + down_bias``, ``a = act(z)`` and ``dz = act'(z) ∘ (scale · dy up)``:

``dup = scale · dyᵀ a``, ``dup_bias = scale · Σ dy``, ``ddown = dzᵀ h``, ``ddown_bias = Σ dz``, ``dh = dy + dz down``.

With a base of its own ``dbase = dy`` and ``dh = dz down``. ``a`` is made again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from peftkit_kernels.core.schedule import Schedule
from peftkit_kernels.low_rank import unflatten
from peftkit_kernels.ops.bottleneck.reference import ACTIVATIONS
from peftkit_kernels.ops.bottleneck.torch_passes import TorchPasses
from peftkit_kernels.ops.bottleneck.triton_passes import TritonPasses

Passes = TorchPasses | TritonPasses


class Adapter(NamedTuple):
    """The arguments, as ``bottleneck`` describes them."""

    h: Tensor
    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    base: Tensor | None
    scale: float
    act: str


class Kept(NamedTuple):
    """What the backward needs: ``h`` for ddown, and ``z``, ``[M, R]``, for all but dup_bias and dbase; the biases for their dtypes."""

    h: Tensor | None
    z: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    scale: float
    act: str
    has_base: bool


class Grads(NamedTuple):
    """The tensors that may need a gradient, their gradients, or whether each is needed."""

    h: Any
    down: Any
    down_bias: Any
    up: Any
    up_bias: Any
    base: Any


def forward(P: Passes, call: Adapter) -> tuple[Tensor, Tensor]:
    """``base + scale · (act(z) upᵀ + up_bias)``, and ``z``."""
    base = None if call.base is None else P.rows(call.base)
    y, z = P.adapt(P.rows(call.h), *call[1:5], base, call.scale, call.act)
    return unflatten(y, call.h.shape), z


def trained(call: Adapter) -> Grads:
    """All tensors."""
    return Grads(*call[:6])


def keep(call: Adapter, y: Tensor, z: Tensor, needs: Grads) -> Kept:
    """What the backward needs."""
    return Kept(
        call.h if needs.down else None,
        z if needs.h or needs.down or needs.down_bias or needs.up else None,
        call.down,
        call.down_bias if needs.down_bias else None,
        call.up,
        call.up_bias if needs.up_bias else None,
        call.scale,
        call.act,
        call.base is not None,
    )


def backward(P: Passes, kept: Kept, dy: Tensor, needs: Grads) -> Grads:
    """The gradients that are needed, by the formulas of this module."""
    flat, scale = P.rows(dy), kept.scale
    dh = ddown = ddown_bias = dup = dup_bias = a = dz = None
    if needs.up_bias and kept.up_bias is not None:
        dup_bias = P.sum_of_rows(flat, kept.up_bias.dtype, scale)
    if kept.z is not None and (needs.h or needs.down or needs.down_bias):
        a, dz, dh = P.grads_inside(
            *(flat, kept.z, kept.down, kept.up, scale, kept.act),
            has_base=kept.has_base,
            needs_a=needs.up,
            needs_dz=needs.down or needs.down_bias,
            needs_dh=needs.h,
        )
    elif kept.z is not None and needs.up:
        # only dup is needed, and nothing has to read dy for a
        a = ACTIVATIONS[kept.act](kept.z)
    if needs.down and kept.h is not None:
        ddown = P.grad_down(dz, P.rows(kept.h), kept.down)
    if needs.down_bias and kept.down_bias is not None:
        ddown_bias = P.sum_of_rows(dz, kept.down_bias.dtype)
    if needs.up:
        dup = P.grad_up(flat, a, scale, kept.up)
    dh = None if dh is None else unflatten(dh, dy.shape)
    return Grads(dh, ddown, ddown_bias, dup, dup_bias, dy if needs.base else None)


def like(call: Adapter) -> tuple[Tensor, Tensor]:
    """Uninitialised results of ``forward``."""
    h = call.h
    return h.new_empty(h.shape), h.new_empty(h.shape[:-1].numel(), call.down.shape[0])


def like_grads(kept: Kept, dy: Tensor, needs: Grads) -> Grads:
    """Uninitialised results of ``backward``."""
    trained = (dy, kept.down, kept.down_bias, kept.up, kept.up_bias)
    new = [
        t.new_empty(t.shape) if needed and t is not None else None
        for t, needed in zip(trained, needs[:5], strict=True)
    ]
    return Grads(*new, dy if needs.base else None)


bottleneck = Schedule(
    "bottleneck",
    TorchPasses,
    TritonPasses,
    forward=forward,
    keep=keep,
    backward=backward,
    trained=trained,
    like=like,
    like_grads=like_grads,
    tuples=(Adapter, Kept, Grads),
)
