"""``int8_compute_linear`` by Triton kernels, as torch.library ops: traceable, and differentiable once.

Each direction has two kernels: one quantises the rows and computes their low-rank product, one multiplies the codes and adds the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core import recompute, workspace
from peftkit_kernels.core.dropout import keep_scale, threshold
from peftkit_kernels.core.launch import aligned, cdiv, dot_precision, launch
from peftkit_kernels.core.op import Differentiable, Op
from peftkit_kernels.low_rank import LoRA, adapter_dtype, cast, passes, rows
from peftkit_kernels.low_rank.config import block_r
from peftkit_kernels.ops.int8_compute_linear.config import Int8GemmConfig, QuantizeConfig
from peftkit_kernels.ops.int8_compute_linear.reference import outlier_columns
from peftkit_kernels.ops.lora_linear.torch_impl import unflatten
from peftkit_kernels.storage.int8 import Int8Weight


@functools.cache
def _kernels() -> Any:
    from peftkit_kernels.ops.int8_compute_linear import kernels

    return kernels


def quantize(
    x: Tensor,
    A: Tensor | None,
    *,
    scale: float = 1.0,
    p: float = 0.0,
    seed: int = 0,
    column_scale: Tensor | None = None,
    skip: Tensor | None = None,
    config: QuantizeConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The codes of ``x`` by rows, the step of each row, and ``scale · drop(x) Aᵀ``, with one read of ``x`` from DRAM.

    Args:
        x: ``[M, K]``, at least one row.
        A: ``[R, K]`` in ``adapter_dtype``, any strides, or ``None``.
        scale: Factor on the low-rank product.
        p: Dropout probability on the input of the low-rank product.
        seed: Seed of that dropout.
        column_scale: ``Float32[K]``, multiplied with ``x`` before it is quantised, or ``None``.
        skip: ``Bool[K]``, columns that are quantised as 0, or ``None``.
        config: Replaces the configuration that would be chosen.

    Returns:
        ``Int8[M, K]`` in the workspace, ``Float32[M]``, and ``[M, R]`` in the dtype of ``A`` or ``None``.
    """
    (M, K), x = x.shape, passes.readable(x)
    R = 0 if A is None else A.shape[0]
    c = config or QuantizeConfig.choose(
        max(R, 1), itemsize=x.element_size(), dropout=p > 0, aligned=aligned(x)
    )
    codes = workspace.take((M, K), torch.int8, x.device)
    step = x.new_empty(M, dtype=torch.float32)
    s = None if A is None else A.new_empty(M, R)
    launch(
        _kernels().quantize_kernel,
        (cdiv(M, c.block_m),),
        *(x, column_scale, None if skip is None else skip.view(torch.uint8), A, codes, step, s),
        *(scale * keep_scale(p), seed, threshold(p), M, K, R, x.stride(0)),
        *((0, 0) if A is None else A.stride()),
        *(K, 0 if s is None else s.stride(0)),
        HAS_SCALE=column_scale is not None,
        HAS_SKIP=skip is not None,
        HAS_LORA=A is not None,
        DROPOUT=p > 0,
        BLOCK_M=c.block_m,
        BLOCK_K=c.block_k,
        BLOCK_R=block_r(max(R, 1)),
        PRECISION=dot_precision(x.dtype, A),
        num_warps=c.num_warps,
        num_stages=c.num_stages,
        # a code is a product that must be rounded before the sum that rounds it to an integer
        fp_fusion=False,
    )
    return codes, step, s


def product(
    codes: Tensor,
    weight: Tensor,
    row_step: Tensor,
    column_step: Tensor | None,
    s: Tensor | None,
    B: Tensor | None,
    scale: float,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    p: float = 0.0,
    seed: int = 0,
    config: Int8GemmConfig | None = None,
) -> Tensor:
    """``(codes weightᵀ) · row_step · column_step + mask ∘ (scale · s Bᵀ) + bias``, ``[M, N]`` in ``dtype``, rounded once.

    Args:
        codes: ``Int8[M, K]``.
        weight: ``Int8[N, K]``, any strides.
        row_step: ``Float32[M]``.
        column_step: ``Float32[N]`` or ``None``.
        s: ``[M, R]`` or ``None``.
        B: ``[N, R]``, the dtype of ``s``, any strides, or ``None``.
        scale: Factor on the update.
        dtype: The dtype of the result.
        bias: ``[N]`` or ``None``.
        p: Probability of the dropout over the columns of the update.
        seed: Seed of that dropout.
        config: Replaces the configuration that would be chosen.
    """
    (M, K), N = codes.shape, weight.shape[0]
    y, R = codes.new_empty(M, N, dtype=dtype), 0 if s is None else s.shape[1]
    c = config or Int8GemmConfig.choose(
        *(M, max(R, 1)),
        itemsize=y.element_size(),
        dropout=p > 0,
        aligned=aligned(codes, weight, y),
    )
    launch(
        _kernels().int8_gemm_kernel,
        (cdiv(M, c.block_m) * cdiv(N, c.block_n),),
        *(codes, weight, row_step, column_step, s, B, bias, y),
        *(scale * keep_scale(p), seed, threshold(p), M, N, K, R),
        *(codes.stride(0), *weight.stride()),
        *((0, 0, 0) if s is None or B is None else (s.stride(0), *B.stride())),
        N,
        HAS_STEP=column_step is not None,
        HAS_LORA=s is not None,
        HAS_BIAS=bias is not None,
        DROPOUT=p > 0,
        BLOCK_M=c.block_m,
        BLOCK_N=c.block_n,
        BLOCK_K=c.block_k,
        BLOCK_R=block_r(max(R, 1)),
        GROUP=c.group,
        PRECISION=dot_precision(dtype, s),
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )
    return y


def forward(
    x: Tensor,
    codes: Tensor,
    row_absmax: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scale: float,
    p: float,
    seed: int,
    outlier: float | None,
) -> tuple[Tensor, Tensor]:
    """``y``, ``[..., N]``, and ``s = drop(x) Aᵀ``, ``[M, R]`` (``[M, 0]`` without an adapter)."""
    if not x.numel():
        return _empty_outputs(x, codes, row_absmax, bias, A)
    flat, dtype, q = rows(x), x.dtype, Int8Weight(codes, row_absmax)
    wide_A, wide_B = (None if t is None else cast(t, adapter_dtype(x, t)) for t in (A, B))
    bias = None if bias is None else cast(bias, dtype)
    skip = outlier_columns(flat, outlier)
    x8, step, s = quantize(flat, wide_A, p=p, seed=seed, skip=skip)
    y = product(x8, codes, step, q.row_scale(), s, wide_B, scale, dtype, bias=bias)
    if skip is not None:
        # only here the host waits for the device, because the number of outlier columns decides which product is launched
        columns = skip.nonzero().view(-1)
        if columns.numel():
            weight = codes[:, columns] * q.row_scale()[:, None]
            y.addmm_(flat[:, columns], cast(weight, dtype).t())
    return unflatten(y, x.shape), flat.new_empty(flat.shape[0], 0) if s is None else s


def _empty_outputs(
    x: Tensor, codes: Tensor, row_absmax: Tensor, bias: Any, A: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], codes.shape[0])
    M = x.shape[:-1].numel()
    if A is None:
        return y, x.new_empty(M, 0)
    return y, x.new_empty(M, A.shape[0], dtype=adapter_dtype(x, A))


def backward(
    dy: Tensor,
    codes: Tensor,
    row_absmax: Tensor,
    x: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    s: Tensor | None,
    scale: float,
    p: float,
    seed: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Those of ``dx``, ``dA`` and ``dB`` that ``needs`` selects. dA needs ``x``, and dB needs ``s``."""
    if not dy.numel():
        grads = _like_grads(dy, codes, row_absmax, x, A, B, s, scale, p, seed, needs)
        return [grad.zero_() for grad in grads]
    needs_x, needs_A, needs_B = needs
    flat, dtype = rows(dy), dy.dtype
    wide_A, wide_B = (None if t is None else cast(t, adapter_dtype(dy, t)) for t in (A, B))
    dx = dA = dB = ds = None
    if needs_B and B is not None:
        dB = passes.grad_b(flat, s, scale, B.dtype)
    if needs_x:
        steps = Int8Weight(codes, row_absmax).row_scale()
        factor = None if wide_B is None else wide_B.t()
        g8, step, ds = quantize(flat, factor, scale=scale, column_scale=steps)
        update = None if wide_A is None else wide_A.t()
        dx = product(g8, codes.t(), step, None, ds, update, 1.0, dtype, p=p, seed=seed)
        dx = unflatten(dx, dy.shape)
    elif needs_A:
        ds = passes.grad_s(flat, wide_B, scale)
    if needs_A and A is not None:
        dA = passes.grad_a(ds, rows(x), A.dtype, p, seed)
    return [grad for grad in (dx, dA, dB) if grad is not None]


def _like_grads(
    dy: Tensor,
    codes: Tensor,
    row_absmax: Tensor,
    x: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    s: Tensor | None,
    scale: float,
    p: float,
    seed: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    like = dy.new_empty(*dy.shape[:-1], codes.shape[1]), A, B
    return [
        t.new_empty(t.shape)
        for t, needed in zip(like, needs, strict=True)
        if needed and t is not None
    ]


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, codes, row_absmax, _, A, B, *numbers, _ = inputs
    ctx.recompute_x, x_parts = recompute.saved_for(x, A is not None and A.requires_grad)
    s = output[1] if B is not None and B.requires_grad else None
    ctx.save_for_backward(codes, row_absmax, A, B, s, *x_parts)
    ctx.numbers = numbers


def _backward(ctx: Any, needs: Sequence[bool], dy: Tensor) -> tuple[Tensor | None, ...]:
    codes, row_absmax, A, B, s, *x_parts = ctx.saved_tensors
    needs_x, needs_bias, needs_A, needs_B = needs
    dbias = rows(dy).sum(0) if needs_bias else None
    wanted = [needs_x, needs_A, needs_B]
    grads: Sequence[Tensor] = []
    if any(wanted):
        x = recompute.restore(ctx.recompute_x, x_parts)
        grads = _backward_op(dy, codes, row_absmax, x, A, B, s, *ctx.numbers, wanted)
    found = iter(grads)
    dx, dA, dB = (next(found) if needed else None for needed in wanted)
    return dx, dbias, dA, dB


_forward_op = Op(
    "int8_compute_linear",
    "(Tensor x, Tensor codes, Tensor row_absmax, Tensor? bias, Tensor? A, Tensor? B, float scale, float p,"
    " int seed, float? outlier) -> (Tensor, Tensor)",
    forward,
    _empty_outputs,
)
int8_compute_linear_triton = Differentiable(_forward_op, ("x", "bias", "A", "B"), _keep, _backward)
_backward_op = Op(
    "int8_compute_linear_backward",
    "(Tensor dy, Tensor codes, Tensor row_absmax, Tensor? x, Tensor? A, Tensor? B, Tensor? s, float scale,"
    " float p, int seed, bool[] needs) -> Tensor[]",
    backward,
    _like_grads,
)


def run_triton(
    x: Tensor, q: Int8Weight, bias: Tensor | None, lora: LoRA | None, outlier: float | None
) -> Tensor:
    """``int8_compute_linear`` on Triton."""
    A, B, numbers = (
        (None, None, (0.0, 0.0, 0)) if lora is None else (lora.A, lora.B, lora.numbers())
    )
    return int8_compute_linear_triton(x, *q.tensors(), bias, A, B, *numbers, outlier)
