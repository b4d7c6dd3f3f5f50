"""``bottleneck`` from torch ops: keeps only h and the ``[M, R]`` input of the activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkit_kernels import low_rank
from peftkit_kernels.core import recompute
from peftkit_kernels.core.autograd import once_differentiable
from peftkit_kernels.gemm import matmul_nn, matmul_nt
from peftkit_kernels.low_rank import cast, rows, unflatten
from peftkit_kernels.ops.bottleneck.reference import ACTIVATIONS

Numbers = tuple[float, str]


class Bottleneck(torch.autograd.Function):
    """With ``z = h downᵀ + down_bias``, ``a = act(z)`` and ``dz = act'(z) ∘ (scale · dy up)``:

    ``dup = scale · dyᵀ a``, ``dup_bias = scale · Σ dy``, ``ddown = dzᵀ h``, ``ddown_bias = Σ dz``, ``dh = dy + dz down``.

    With a separate base ``dbase = dy`` and ``dh = dz down``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        down: Tensor,
        down_bias: Tensor | None,
        up: Tensor,
        up_bias: Tensor | None,
        base: Tensor | None,
        numbers: Numbers,
    ) -> Tensor:
        scale, act = numbers
        flat, dtype = rows(h), h.dtype
        z = matmul_nt(flat, cast(down, dtype), _cast_bias(down_bias, dtype))
        # the scale multiplies act(z) and the bias, so that no pass over y is needed for it
        cast_bias = None if up_bias is None else cast(up_bias, dtype) * scale
        y = matmul_nt(ACTIVATIONS[act](z).mul(scale), cast(up, dtype), cast_bias)
        y.add_(flat if base is None else rows(base))
        _, needs_down, _, needs_up, *_ = ctx.needs_input_grad
        inner = any(ctx.needs_input_grad[:3])
        ctx.recompute_h, h_parts = recompute.saved_for(h, needs_down)
        ctx.save_for_backward(z if inner or needs_up else None, down, up, *h_parts)
        ctx.numbers, ctx.shape, ctx.has_base = numbers, h.shape, base is not None
        ctx.dtypes = tuple(None if b is None else b.dtype for b in (down_bias, up_bias))
        return unflatten(y, h.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, down, up, *h_parts = ctx.saved_tensors
        scale, act = ctx.numbers
        needs_h, needs_down, needs_down_bias, needs_up, needs_up_bias, needs_base, _ = (
            ctx.needs_input_grad
        )
        dbase, dy = dy if needs_base else None, rows(dy)
        dh = ddown = ddown_bias = dup = dup_bias = None
        if needs_up_bias:
            dup_bias = cast(_sum(dy, ctx.dtypes[1]).mul_(scale), ctx.dtypes[1])
        if needs_h or needs_down or needs_down_bias:
            da = matmul_nn(dy, cast(up, dy.dtype)).mul_(scale)
            a, dz = _activation_backward(da, z, act)
            if needs_down:
                h = recompute.restore(ctx.recompute_h, h_parts)
                ddown = low_rank.grad_a(dz, rows(h), down.dtype)
            if needs_down_bias:
                ddown_bias = cast(_sum(dz, ctx.dtypes[0]), ctx.dtypes[0])
            if needs_h:
                dh = matmul_nn(dz, cast(down, dz.dtype))
                dh = (dh if ctx.has_base else dh.add_(dy)).view(ctx.shape)
        elif needs_up:
            a = ACTIVATIONS[act](z)
        if needs_up:
            dup = low_rank.grad_b(dy, a, scale, up)
        return dh, ddown, ddown_bias, dup, dup_bias, dbase, None


def _activation_backward(da: Tensor, z: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """``act(z)``, recomputed, and ``da ∘ act'(z)`` by torch's own derivative."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        a = ACTIVATIONS[act](leaf)
        (dz,) = torch.autograd.grad(a, leaf, da)
    return a.detach(), dz


def _cast_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else cast(bias, dtype)


def _sum(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the rows, in float32 if a 16-bit ``grad`` is summed for a float32 ``dtype``."""
    return grad.sum(0, dtype=torch.promote_types(grad.dtype, dtype))
