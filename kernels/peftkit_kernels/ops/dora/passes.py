"""Launches of DoRA's kernels: the norm of an updated weight, and the gradient of a magnitude."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core.launch import cdiv, dot_precision, launch, target_of
from peftkit_kernels.low_rank import cast, passes
from peftkit_kernels.low_rank.config import block_r, looped_ranks
from peftkit_kernels.ops.dora.config import MagnitudeConfig, NormConfig
from peftkit_kernels.storage.int8 import Int8Weight
from peftkit_kernels.storage.nf4 import NF4Weight
from peftkit_kernels.storage.nf4.triton_impl import absmax_arguments, absmax_constants, words_of
from peftkit_kernels.storage.quantized import Weight, decode_triton

_NO_BLOCKS = {"NESTED": False, "BLOCKSIZE": 8, "NESTED_BLOCK": 1}


@functools.cache
def _kernels() -> Any:
    from peftkit_kernels.ops.dora import kernels

    return kernels


def weight_norm(
    weight: Weight, A: Tensor, B: Tensor, scale: float, *, config: NormConfig | None = None
) -> Tensor:
    """``|W + scale · B A|`` of every row, ``Float32[N]``, with one read of the stored weight for each tile of ranks.

    The product with A is 16-bit if A is 16-bit and a dense weight is too; sums are float32. A 4-bit weight whose rows are not
    whole words, and a float8 weight, are decoded first.
    """
    N, K = weight.shape
    norm = A.new_empty(N, dtype=torch.float32)
    if not N or not K:
        return norm.zero_()
    has_words = isinstance(weight, NF4Weight) and not K % 8 and words_of(weight.packed)[1]
    if not (isinstance(weight, (Tensor, Int8Weight)) or has_words):
        weight = decode_triton(weight, torch.float32)
    dtype = A.dtype
    if isinstance(weight, Tensor):
        dtype = torch.promote_types(dtype, weight.dtype)
        storage, stored, constants = "dense", (weight, None, None, None, None), _NO_BLOCKS
        strides = tuple(weight.stride())
    elif isinstance(weight, Int8Weight):
        storage, stored = "int8", (weight.codes, weight.row_absmax, None, None, None)
        strides, constants = tuple(weight.codes.stride()), _NO_BLOCKS
    elif isinstance(weight, NF4Weight):
        storage, stored = "nf4", (words_of(weight.packed)[0], *absmax_arguments(weight))
        strides, constants = (0, 0), absmax_constants(weight)
    else:
        raise TypeError(f"the kernel reads no {type(weight).__name__}")
    R, float_A, float_B = A.shape[0], A.float(), B.float()
    # torch computes these small products, [R, R] and [N, R], because they would take registers in the kernel
    update = (float_B @ (float_A @ float_A.t())).mul_(float_B).sum(1).mul_(scale * scale)
    A = cast(A, dtype)
    tile = looped_ranks(R)
    c = config or NormConfig.choose(tile, itemsize=A.element_size())
    launch(
        _kernels().norm_kernel,
        (cdiv(N, c.block_n),),
        *(*stored, A, B, update, norm, scale, N, K, R),
        *(*strides, *A.stride(), *B.stride()),
        STORAGE=storage,
        **constants,
        BLOCK_N=c.block_n,
        BLOCK_K=c.block_k,
        BLOCK_R=block_r(tile),
        TILES=cdiv(R, tile),
        PRECISION=dot_precision(dtype),
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )
    return norm


def magnitude_grad(
    dy: Tensor,
    y: Tensor,
    bias: Tensor | None,
    divisor: Tensor,
    dtype: torch.dtype,
    *,
    config: MagnitudeConfig | None = None,
) -> Tensor:
    """``Σ dy ∘ (y - bias) / divisor``, ``[N]`` in ``dtype``; dy and y are read once."""
    (M, N), dy, y = dy.shape, passes.readable(dy), passes.readable(y)
    c = config or MagnitudeConfig.choose(M, N, target=target_of(dy))
    chunks = cdiv(M, c.chunk_m)
    total = dy.new_empty(1, N, dtype=torch.float32)
    partial = total if chunks == 1 else dy.new_empty(chunks, 1, N, dtype=torch.float32)
    launch(
        _kernels().magnitude_grad_kernel,
        (chunks, cdiv(N, c.block_n)),
        *(dy, y, bias, partial, M, N, c.chunk_m, dy.stride(0), y.stride(0)),
        HAS_BIAS=bias is not None,
        BLOCK_M=c.block_m,
        BLOCK_N=c.block_n,
        num_warps=c.num_warps,
        num_stages=1,
    )
    if chunks > 1:
        passes.add_up(partial, total)
    return cast(total[0].div_(divisor.float()), dtype)
