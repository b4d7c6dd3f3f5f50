"""``lora_linear`` by Triton kernels around the library's GEMMs, as torch.library ops: traceable, and differentiable once.

There are two schedules (``low_rank.config.fuses_gemm`` chooses). *addmm* writes the update first and lets the GEMM add to it: the
GEMM reads it back while its main loop runs, and only the small term is rounded before the sum. *fused* is one kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core import recompute
from peftkit_kernels.core.launch import target_of
from peftkit_kernels.core.op import Differentiable, Op
from peftkit_kernels.low_rank import adapter_dtype, cast, passes, rows
from peftkit_kernels.low_rank.config import RANK_TILE, fuses_gemm
from peftkit_kernels.ops.lora_linear.torch_impl import unflatten
from peftkit_kernels.ops.quantized_linear.passes import decodes_in_product, small_m
from peftkit_kernels.storage.int8 import Int8ComputeWeight
from peftkit_kernels.storage.int8.product import passes as int8
from peftkit_kernels.storage.quantized import Weight, dense_triton


def project(
    x: Tensor,
    weight: Weight,
    s: Tensor | None = None,
    B: Tensor | None = None,
    scale: float = 1.0,
    *,
    bias: Tensor | None = None,
    p: float = 0.0,
    seed: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """``x Wᵀ + mask ∘ (scale · s Bᵀ) + bias`` by one of the schedules; arguments as ``passes.gemm_lora``.

    The weight may be quantised if there is no mask, or have another dtype. Without ``s`` and ``B`` there is no update. ``out``
    may have any row stride.
    """
    N, K = weight.shape
    bias = None if bias is None else cast(bias, x.dtype)
    if isinstance(weight, Int8ComputeWeight):
        return int8.linear(x, weight, s, B, scale, bias=bias, out=out)
    fits_one_program = out is None and (s is None or s.shape[1] <= RANK_TILE)
    if (
        fits_one_program
        and not isinstance(weight, Tensor)
        and decodes_in_product(x.shape[0], weight, target_of(x))
    ):
        return small_m(x, weight, bias, s, B, scale)
    weight = dense_triton(weight, x.dtype)
    if s is None or B is None:
        if out is None:
            return torch.nn.functional.linear(x, weight, bias)
        if bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(bias, x, weight.t(), out=out)
    if fits_one_program and fuses_gemm(N, K, itemsize=x.element_size(), target=target_of(x)):
        return passes.gemm_lora(x, weight, s, B, scale, bias=bias, p=p, seed=seed)
    # the update before the product: the GEMM reads it back while its main loop runs
    update = passes.expand(s, B, scale, bias=bias, p=p, seed=seed, out=out, dtype=x.dtype)
    return update.addmm_(x, weight.t())


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """``y`` as ``lora_linear`` defines it, ``[..., N]``, and ``s = drop(x) Aᵀ``, ``[M, R]``."""
    if not x.numel():
        return _empty_outputs(x, weight, bias, A, B, scale, p, seed)
    flat, wide = rows(x), adapter_dtype(x, A)
    s = passes.shrink(flat, cast(A, wide), p, seed)
    y = project(flat, weight, s, cast(B, wide), scale, bias=bias)
    return unflatten(y, x.shape), s


def _empty_outputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, x.new_empty(x.shape[:-1].numel(), A.shape[0], dtype=adapter_dtype(x, A))


def backward(
    dy: Tensor,
    weight: Tensor,
    x: Tensor | None,
    A: Tensor,
    B: Tensor,
    s: Tensor | None,
    scale: float,
    p: float,
    seed: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Those of ``dx``, ``dA`` and ``dB`` that ``needs`` selects. dA needs ``x``, and dB needs ``s``."""
    if not dy.numel():
        grads = _like_grads(dy, weight, x, A, B, s, scale, p, seed, needs)
        return [grad.zero_() for grad in grads]
    needs_x, needs_A, needs_B = needs
    flat, dtype, wide = rows(dy), dy.dtype, adapter_dtype(dy, A)
    wide_A, wide_B = cast(A, wide), cast(B, wide)
    dx = dA = dB = ds = None
    # one pass over dy can compute dB and ds, if both are needed
    if needs_B and (needs_x or needs_A):
        dB, ds = passes.grad_b_and_s(flat, s, wide_B, scale, B.dtype)
    elif needs_B:
        dB = passes.grad_b(flat, s, scale, B.dtype)
    elif needs_x or needs_A:
        ds = passes.grad_s(flat, wide_B, scale)
    if needs_A:
        dA = passes.grad_a(ds, rows(x), A.dtype, p, seed)
    if needs_x:
        W = cast(weight, dtype)
        dx = project(flat, W.t(), ds, wide_A.t(), 1.0, p=p, seed=seed)
        dx = unflatten(dx, dy.shape)
    return [grad for grad in (dx, dA, dB) if grad is not None]


def _like_grads(
    dy: Tensor,
    weight: Tensor,
    x: Tensor | None,
    A: Tensor,
    B: Tensor,
    s: Tensor | None,
    scale: float,
    p: float,
    seed: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    dx = dy.new_empty(*dy.shape[:-1], weight.shape[1])
    grads = dx, A.new_empty(A.shape), B.new_empty(B.shape)
    return [grad for grad, needed in zip(grads, needs, strict=True) if needed]


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, A, B, *numbers = inputs
    ctx.recompute_x, x_parts = recompute.saved_for(x, A.requires_grad)
    ctx.save_for_backward(weight, A, B, output[1] if B.requires_grad else None, *x_parts)
    ctx.numbers = numbers


def _backward(ctx: Any, needs: Sequence[bool], dy: Tensor) -> tuple[Tensor | None, ...]:
    weight, A, B, s, *x_parts = ctx.saved_tensors
    needs_x, needs_bias, needs_A, needs_B = needs
    dbias = rows(dy).sum(0) if needs_bias else None
    wanted = needs_x, needs_A, needs_B
    if not any(wanted):
        return None, dbias, None, None
    x = recompute.restore(ctx.recompute_x, x_parts)
    grads = iter(_backward_op(dy, weight, x, A, B, s, *ctx.numbers, wanted))
    dx, dA, dB = (next(grads) if needed else None for needed in wanted)
    return dx, dbias, dA, dB


_forward_op = Op(
    "lora_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, float scale, float p, int seed)"
    " -> (Tensor, Tensor)",
    forward,
    _empty_outputs,
)
lora_linear_triton = Differentiable(_forward_op, ("x", "bias", "A", "B"), _keep, _backward)
_backward_op = Op(
    "lora_linear_backward",
    "(Tensor dy, Tensor weight, Tensor? x, Tensor A, Tensor B, Tensor? s, float scale, float p, int seed,"
    " bool[] needs) -> Tensor[]",
    backward,
    _like_grads,
)
