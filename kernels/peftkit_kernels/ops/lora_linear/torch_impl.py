"""``lora_linear`` from torch ops: the BLAS computes the large products, rank-r passes add the update; only x and s are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkit_kernels import low_rank
from peftkit_kernels.core import recompute
from peftkit_kernels.core.autograd import once_differentiable
from peftkit_kernels.gemm import matmul_nn, matmul_nt
from peftkit_kernels.low_rank import LoRA, cast, rows


def project(
    x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor | None, lora: LoRA | None
) -> Tensor:
    """``x Wᵀ + bias + scale · s Bᵀ`` for rows ``x [M, K]`` and ``s [M, R]``."""
    bias = None if bias is None else cast(bias, x.dtype)
    y = matmul_nt(x, cast(weight, x.dtype), bias)
    return y if lora is None or s is None else low_rank.expand_(y, s, lora.B, lora.scale)


def unflatten(y: Tensor, shape: torch.Size) -> Tensor:
    """``y [M, N]`` as ``[*shape[:-1], N]``, in a form that autograd does not treat as a view. Do not use ``y`` afterwards.

    A view returned by an autograd function could not be changed in place, and models do change outputs in place.
    """
    if len(shape) == 2:
        return y
    if y.is_contiguous():
        return y.resize_(*shape[:-1], y.shape[-1])  # takes a fifth of the time of _unsafe_view
    return torch.ops.aten._unsafe_view(y, (*shape[:-1], y.shape[-1]))


def add_update_grad(dx: Tensor, ds: Tensor, lora: LoRA) -> Tensor:
    """``dx += drop'(ds A)``: the adapter's part of the input gradient, with the mask of the forward."""
    return low_rank.expand_grad_(dx, ds, lora.A, lora.p, lora.seed)


class LoRALinear(torch.autograd.Function):
    """With ``s = drop(x) Aᵀ`` and ``ds = scale · dy B``:

    ``dB = scale · dyᵀ s``, ``dA = dsᵀ drop(x)``, ``dx = dy W + mask ∘ (ds A)``, ``dbias = Σ dy``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        numbers: tuple[float, float, int],
    ) -> Tensor:
        lora = LoRA(A, B, *numbers)
        flat = rows(x)
        s = low_rank.shrink(flat, A, lora.p, lora.seed)
        y = project(flat, weight, bias, s, lora)
        _, _, _, needs_A, needs_B, _ = ctx.needs_input_grad
        ctx.recompute_x, x_parts = recompute.saved_for(x, needs_A)
        # neither a dropped x nor a mask: the mask is recomputed from its seed
        ctx.save_for_backward(weight, A, B, s if needs_B else None, *x_parts)
        ctx.numbers, ctx.shape = numbers, x.shape
        return unflatten(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, A, B, s, *x_parts = ctx.saved_tensors
        lora = LoRA(A, B, *ctx.numbers)
        needs_x, _, needs_bias, needs_A, needs_B, _ = ctx.needs_input_grad
        dy = rows(dy)
        dB = low_rank.grad_b(dy, s, lora.scale, B) if needs_B else None
        dbias = dy.sum(0) if needs_bias else None
        dx = dA = None
        if needs_x or needs_A:
            ds = low_rank.grad_s(dy, B, lora.scale)
            if needs_A:
                x = recompute.restore(ctx.recompute_x, x_parts)
                dA = low_rank.grad_a(ds, rows(x), A.dtype, lora.p, lora.seed)
            if needs_x:
                dx = add_update_grad(matmul_nn(dy, cast(weight, dy.dtype)), ds, lora)
                dx = unflatten(dx, ctx.shape)
        return dx, None, dbias, dA, dB, None
