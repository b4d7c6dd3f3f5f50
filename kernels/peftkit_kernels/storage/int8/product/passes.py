"""The passes of the 8-bit product: each function allocates, chooses a configuration and launches."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkit_kernels.core import workspace
from peftkit_kernels.core.dropout import keep_scale, threshold
from peftkit_kernels.core.launch import aligned, cdiv, dot_precision, launch, target_of
from peftkit_kernels.low_rank import passes
from peftkit_kernels.low_rank.config import RANK_TILE, block_r
from peftkit_kernels.storage.int8.product.config import (
    Int8GemmConfig,
    LargeColumnsConfig,
    QuantizeConfig,
)
from peftkit_kernels.storage.int8.weight import Int8ComputeWeight


@functools.cache
def _kernels() -> Any:
    from peftkit_kernels.storage.int8.product import kernels

    return kernels


class Outliers(NamedTuple):
    """The columns of ``x [M, K]`` in which some magnitude reaches a threshold. How many they are is known on the device only.

    Attributes:
        x: The tensor.
        skip: ``Bool[K]``.
        columns: ``Int32[1 + K]``, how many they are, and their numbers in ascending order.
    """

    x: Tensor
    skip: Tensor
    columns: Tensor


def outliers_of(x: Tensor, limit: float) -> Outliers:
    """The outlier columns of ``x [M, K]``: those in which some magnitude reaches ``limit``. ``x`` is read once."""
    (M, K), x = x.shape, passes.readable(x)
    c = LargeColumnsConfig.choose(M, K, target=target_of(x))
    chunks = cdiv(M, c.chunk_m)
    large = x.new_empty(chunks, K, dtype=torch.int8)
    skip, columns = x.new_empty(K, dtype=torch.bool), x.new_empty(1 + K, dtype=torch.int32)
    launch(
        _kernels().large_columns_kernel,
        (chunks, cdiv(K, c.block_k)),
        *(x, large, limit, M, K, c.chunk_m, x.stride(0)),
        BLOCK_M=c.block_m,
        BLOCK_K=c.block_k,
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )
    launch(
        _kernels().list_columns_kernel,
        (1,),
        *(large, skip.view(torch.int8), columns, chunks, K),
        BLOCK_K=1024,
        num_warps=4,
        num_stages=1,
    )
    return Outliers(x, skip, columns)


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
    outliers: Outliers | None = None,
    out: Tensor | None = None,
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
        outliers: Columns that the codes lack, multiplied in their own dtype, or ``None``.
        out: ``[M, N]`` to write to, with any row stride, or ``None``.
        config: Replaces the configuration that would be chosen.
    """
    (M, K), N = codes.shape, weight.shape[0]
    y = codes.new_empty(M, N, dtype=dtype) if out is None else out
    R = 0 if s is None else s.shape[1]
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
        *((None, None) if outliers is None else (outliers.x, outliers.columns)),
        *(scale * keep_scale(p), seed, threshold(p), M, N, K, R),
        *(codes.stride(0), *weight.stride()),
        *((0, 0, 0) if s is None or B is None else (s.stride(0), *B.stride())),
        *(y.stride(0), 0 if outliers is None else outliers.x.stride(0)),
        HAS_STEP=column_step is not None,
        HAS_LORA=s is not None,
        HAS_BIAS=bias is not None,
        DROPOUT=p > 0,
        HAS_OUTLIERS=outliers is not None,
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


class Quantized(NamedTuple):
    """An input in 8 bits.

    Attributes:
        x: ``[M, K]``, the input itself.
        codes: ``Int8[M, K]``, in the workspace; 0 in the outlier columns.
        step: ``Float32[M]``.
        s: ``drop(x) Aᵀ`` or ``None``.
        outliers: The columns that reach the threshold, if there is one.
        threshold: That.
    """

    x: Tensor
    codes: Tensor
    step: Tensor
    s: Tensor | None
    outliers: Outliers | None
    threshold: float | None


def quantize_input(
    x: Tensor, threshold: float | None, A: Tensor | None = None, *, p: float = 0.0, seed: int = 0
) -> Quantized:
    """The rows ``x [M, K]`` in 8 bits, except the columns that reach the threshold, and ``drop(x) Aᵀ``."""
    found = None if threshold is None else outliers_of(x, threshold)
    skip = None if found is None else found.skip
    return Quantized(x, *quantize(x, A, p=p, seed=seed, skip=skip), found, threshold)


def linear(
    quantized: Quantized,
    weight: Int8ComputeWeight,
    s: Tensor | None = None,
    B: Tensor | None = None,
    scale: float = 1.0,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``x Wᵀ + scale · s Bᵀ + bias``, ``[M, N]``; arguments as ``product``."""
    dtype = quantized.x.dtype
    tensors = quantized.codes, weight.codes, quantized.step, weight.row_scale()
    rest: Any = {"bias": None if bias is None else bias.to(dtype), "outliers": quantized.outliers}
    if s is None or s.shape[1] <= RANK_TILE:
        return product(*tensors, s, B, scale, dtype, out=out, **rest)
    y = product(*tensors, None, None, 1.0, dtype, out=out, **rest)
    assert B is not None, "s and B belong together"
    return passes.expand(s, B, scale, out=y, add=True)


def input_grad(
    dy: Tensor,
    weight: Int8ComputeWeight,
    ds: Tensor | None = None,
    A: Tensor | None = None,
    *,
    p: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """``dy W + mask ∘ (ds A)``, ``[M, K]``, with the rows of ``dy ∘ sw`` in 8 bits; ``A`` is transposed, ``[K, R]``."""
    codes, step, _ = quantize(dy, None, column_scale=weight.row_scale())
    tensors = codes, weight.codes.t(), step, None
    if ds is None or A is None:
        return product(*tensors, None, None, 1.0, dy.dtype)
    if ds.shape[1] <= RANK_TILE:
        return product(*tensors, ds, A, 1.0, dy.dtype, p=p, seed=seed)
    dx = product(*tensors, None, None, 1.0, dy.dtype)
    return passes.expand(ds, A, 1.0, p=p, seed=seed, out=dx, add=True)
