"""A linear from torch ops: the BLAS computes the large products, rank-r passes add the update; only x and s are kept.

A quantised weight is decoded into the workspace before each product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkit_kernels import low_rank
from peftkit_kernels.core import recompute
from peftkit_kernels.core.autograd import once_differentiable
from peftkit_kernels.gemm import matmul_nn, matmul_nt
from peftkit_kernels.low_rank import LoRA, cast, rows
from peftkit_kernels.storage.int8 import Int8ComputeWeight
from peftkit_kernels.storage.int8.product.torch_impl import frozen_product
from peftkit_kernels.storage.quantized import Weight, arguments_of, dense, weights_of


def project(
    x: Tensor, weight: Weight, bias: Tensor | None, s: Tensor | None, lora: LoRA | None
) -> Tensor:
    """``x Wᵀ + bias + scale · s Bᵀ`` for rows ``x [M, K]`` and ``s [M, R]``."""
    if isinstance(weight, Int8ComputeWeight):
        y = frozen_product(x, weight, bias, None, None, weight.threshold)
    else:
        bias = None if bias is None else cast(bias, x.dtype)
        y = matmul_nt(x, dense(weight, x.dtype), bias)
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
        weight: Weight,
        bias: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        numbers: tuple[float, float, int] | None,
    ) -> Tensor:
        lora, flat = _lora(A, B, numbers), rows(x)
        s = None if lora is None else low_rank.shrink(flat, lora.A, lora.p, lora.seed)
        y = project(flat, weight, bias, s, lora)
        _, _, _, needs_A, needs_B, _ = ctx.needs_input_grad
        ctx.recompute_x, x_parts = recompute.saved_for(x, needs_A)
        stored, ctx.storage = arguments_of([weight])
        # neither a dropped x nor a mask: the mask is recomputed from its seed; and not the decoded weight
        ctx.save_for_backward(A, B, s if needs_B else None, *stored, *x_parts)
        ctx.numbers, ctx.shape, ctx.stored = numbers, x.shape, len(stored)
        return unflatten(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        A, B, s, *more = ctx.saved_tensors
        (weight,) = weights_of(more[: ctx.stored], ctx.storage)
        lora = _lora(A, B, ctx.numbers)
        needs_x, _, needs_bias, needs_A, needs_B, _ = ctx.needs_input_grad
        dy = rows(dy)
        dbias = dy.sum(0) if needs_bias else None
        dx = dA = dB = ds = None
        if lora is not None and needs_B:
            dB = low_rank.grad_b(dy, s, lora.scale, lora.B)
        if lora is not None and (needs_x or needs_A):
            ds = low_rank.grad_s(dy, lora.B, lora.scale)
        if lora is not None and needs_A:
            x = recompute.restore(ctx.recompute_x, more[ctx.stored :])
            dA = low_rank.grad_a(ds, rows(x), lora.A.dtype, lora.p, lora.seed)
        if needs_x:
            dx = matmul_nn(dy, dense(weight, dy.dtype))
            dx = unflatten(dx if lora is None else add_update_grad(dx, ds, lora), ctx.shape)
        return dx, None, dbias, dA, dB, None


def _lora(
    A: Tensor | None, B: Tensor | None, numbers: tuple[float, float, int] | None
) -> LoRA | None:
    return None if A is None or B is None or numbers is None else LoRA(A, B, *numbers)
