"""DoRA from torch ops: norms without forming the updated weight, and a linear that folds ``g`` into the weight if that is cheaper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkit_kernels import low_rank, native
from peftkit_kernels.core import recompute, workspace
from peftkit_kernels.core.autograd import once_differentiable
from peftkit_kernels.gemm import matmul_nn, matmul_nt
from peftkit_kernels.low_rank import LoRA, cast, rows, unflatten
from peftkit_kernels.ops.dora_scale.torch_passes import column_products, scaled
from peftkit_kernels.storage.quantized import Weight, decode, dense

_NORM_ROWS = 128
"""Rows of a weight that are processed at a time: at a width of 2,048 they are 1 MiB, which stays in the second-level cache."""


def weight_norm(weight: Weight, lora: LoRA) -> Tensor:
    """``|W + scale · B A|`` of every row without forming the sum, in float32 (float64 for a float64 weight or factor).

    The square is ``|W|² + 2 scale · B ∘ (W Aᵀ) + scale² · B (A Aᵀ) ∘ B``, each term summed over the row. A sum that rounding
    made negative counts as 0.
    """
    wide = torch.promote_types(lora.A.dtype, torch.float32)
    if isinstance(weight, Tensor):
        wide = torch.promote_types(wide, weight.dtype)
    else:
        weight = decode(weight, wide)
    A, B = cast(lora.A, wide), cast(lora.B, wide)
    if A.shape[0] <= native.MAX_RANK and native.supports(weight, A, B):
        return native.updated_norm(weight, A, B, lora.scale)
    squares = A.new_empty(weight.shape[0])
    for start in range(0, weight.shape[0], _NORM_ROWS):
        part, factor = (t[start : start + _NORM_ROWS] for t in (weight, B))
        part = cast(part, wide)
        cross = matmul_nt(part, A).mul_(factor).sum(1)
        squares[start : start + _NORM_ROWS] = (
            part.square().sum(1).add_(cross, alpha=2.0 * lora.scale)
        )
    squares.add_(torch.mm(B, torch.mm(A, A.t())).mul_(B).sum(1), alpha=lora.scale**2)
    return squares.clamp_(min=0.0).sqrt_()


def folds(rows: int, weight: Weight) -> bool:
    """Whether ``g`` multiplies the rows of the weight instead of the output.

    This is cheaper if the weight is decoded anyway, or is smaller than the output. A 16-bit weight is not folded: each scaled
    row would be rounded, and the gradient of the magnitude would contain that error.
    """
    if not isinstance(weight, Tensor):
        return True
    return weight.dtype.itemsize >= 4 and rows >= weight.shape[1]


def scaled_weight(
    weight: Weight, factor: Tensor, dtype: torch.dtype, decode: Callable[..., Tensor] = decode
) -> Tensor:
    """The rows of the weight times ``factor``, in ``dtype``, in the workspace; ``decode`` has the signature of ``quantized.decode``."""
    if isinstance(weight, Tensor):
        out = workspace.take(tuple(weight.shape), dtype, weight.device)
        for block in low_rank.blocks(weight):
            torch.mul(cast(weight[block], dtype), factor[block, None], out=out[block])
        return out
    if dtype is torch.float64:
        return decode(weight, dtype).mul_(factor[:, None])
    return decode(weight, dtype, cast(factor, torch.float32))


class Call(NamedTuple):
    """The arguments of the autograd function that are not differentiable."""

    weight: Weight
    numbers: tuple[float, float, int]
    keep_direction: bool


class DoRALinear(torch.autograd.Function):
    """With ``g = magnitude / norm`` for a constant norm, ``s = drop(x) Aᵀ`` and ``ds = scale · (dy ∘ g) B``:

    ``dB = scale · g ∘ (dyᵀ s)``, ``dA = dsᵀ drop(x)``, ``dx = (dy ∘ g) W + mask ∘ (ds A)``, ``dbias = Σ dy``,
    ``dmagnitude = Σ dy ∘ (y - bias) / magnitude``, or ``Σ dy ∘ z / norm`` if the direction ``z`` is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        call: Call,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        magnitude: Tensor,
        norm: Tensor,
    ) -> Tensor:
        weight, lora = call.weight, LoRA(A, B, *call.numbers)
        flat, dtype = rows(x), x.dtype
        g = cast(magnitude, norm.dtype) / norm
        s = low_rank.shrink(flat, A, lora.p, lora.seed)
        cast_bias = None if bias is None else cast(bias, dtype)
        z = None
        if call.keep_direction:
            z = low_rank.expand_(matmul_nt(flat, dense(weight, dtype)), s, B, lora.scale)
            y = scaled(z, g, cast_bias)
        elif folds(flat.shape[0], weight):
            y = matmul_nt(flat, scaled_weight(weight, g, dtype), cast_bias)
            low_rank.expand_(y, s, B * g[:, None], lora.scale)
        else:
            y = _add_and_scale_(matmul_nt(flat, cast(weight, dtype)), s, lora, g, cast_bias)
        y = unflatten(y, x.shape)
        _, _, _, needs_A, needs_B, needs_magnitude, _ = ctx.needs_input_grad
        ctx.recompute_x, x_parts = recompute.saved_for(x, needs_A)
        kept = (y if z is None else z) if needs_magnitude else None
        ctx.save_for_backward(
            *(bias, A, B, magnitude, None if z is None else norm, g),
            *(s if needs_B else None, kept),
            *(*_tensors(weight), *x_parts),
        )
        ctx.call, ctx.shape, ctx.parts = call, x.shape, len(x_parts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        bias, A, B, magnitude, norm, g, s, kept, *more = ctx.saved_tensors
        weight, lora = ctx.call.weight, LoRA(A, B, *ctx.call.numbers)
        needs_x, _, needs_bias, needs_A, needs_B, needs_magnitude, _ = ctx.needs_input_grad
        dy = rows(dy)
        dbias = dy.sum(0) if needs_bias else None
        dx = dA = dB = dmagnitude = None
        if needs_magnitude and ctx.call.keep_direction:
            dmagnitude = cast(column_products(dy, kept) / norm, magnitude.dtype)
        elif needs_magnitude:
            dmagnitude = _magnitude_grad(dy, rows(kept), bias, magnitude)
        # B takes the rows' factors, so that ds needs no scaled copy of dy; in the dtype of g
        scaled_B = B * g[:, None]
        if needs_B:
            dB = low_rank.grad_b(dy, s, lora.scale, scaled_B).mul_(g[:, None]).to(B.dtype)
        if needs_x or needs_A:
            ds = low_rank.grad_s(dy, scaled_B, lora.scale)
            if needs_A:
                x = recompute.restore(ctx.recompute_x, more[len(more) - ctx.parts :])
                dA = low_rank.grad_a(ds, rows(x), A.dtype, lora.p, lora.seed)
            if needs_x:
                if folds(dy.shape[0], weight) and not ctx.call.keep_direction:
                    dx = matmul_nn(dy, scaled_weight(weight, g, dy.dtype))
                else:
                    dx = matmul_nn(scaled(dy, g, None), dense(weight, dy.dtype))
                dx = low_rank.expand_grad_(dx, ds, A, lora.p, lora.seed).view(ctx.shape)
        return dx, None, dbias, dA, dB, dmagnitude, None


def _add_and_scale_(y: Tensor, s: Tensor, lora: LoRA, g: Tensor, bias: Tensor | None) -> Tensor:
    """``g ∘ (y + scale · s Bᵀ) + bias``, written over ``y`` and rounded once."""
    wide = torch.promote_types(s.dtype, g.dtype)
    s, B = cast(s, wide), cast(lora.B, wide)
    for block in [slice(None)] if y.dtype is wide else low_rank.blocks(y):
        part = cast(y[block], wide).addmm_(s[block], B.t(), alpha=lora.scale).mul_(g)
        if bias is not None:
            part.add_(bias)
        if part.dtype is not y.dtype:
            y[block] = part
    return y


def _tensors(weight: Weight) -> tuple[Tensor, ...]:
    """The dense weight. It is saved only so that autograd notices if it changes before the backward."""
    return (weight,) if isinstance(weight, Tensor) else ()


def _magnitude_grad(dy: Tensor, y: Tensor, bias: Tensor | None, magnitude: Tensor) -> Tensor:
    """``Σ dy ∘ (y - bias) / magnitude``, summed in float32, without a tensor of the size of ``y - bias``."""
    wide = torch.promote_types(magnitude.dtype, torch.float32)
    total = torch.zeros(y.shape[1], dtype=wide, device=y.device)
    for start in range(0, y.shape[0], _NORM_ROWS):
        part = cast(y[start : start + _NORM_ROWS], wide)
        if bias is not None:
            part = part - cast(bias, wide)
        total.add_((part * dy[start : start + _NORM_ROWS]).sum(0))
    return cast(total.div_(cast(magnitude, wide)), magnitude.dtype)
