"""The passes over tiles of rows by Triton kernels. The number of launches does not depend on the number of adapters."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkit_kernels.core.launch import aligned, cdiv, dot_precision, launch, step_of, target_of
from peftkit_kernels.low_rank import adapter_dtype
from peftkit_kernels.low_rank.config import block_r
from peftkit_kernels.low_rank.passes import add_up, readable, sum_tile
from peftkit_kernels.ops.grouped_lora.config import (
    GroupedExpandConfig,
    GroupedShrinkConfig,
    GroupedTallConfig,
    block_m,
)
from peftkit_kernels.ops.grouped_lora.plan import GroupPlan


@functools.cache
def _kernels() -> Any:
    from peftkit_kernels.ops.grouped_lora import kernels

    return kernels


class Table(NamedTuple):
    """The fields of a ``GroupPlan`` that the kernels read, under the same names."""

    order: Tensor
    tiles: Tensor
    adapted: Tensor
    segments: Tensor
    first_segment: Tensor
    block: int


def table_of(plan: GroupPlan) -> Table:
    """The tables of ``plan``."""
    return Table(*(getattr(plan, name) for name in Table._fields))


def grouped_shrink(
    x: Tensor,
    A: Tensor,
    scale: Tensor | None,
    table: Table,
    *,
    config: GroupedShrinkConfig | None = None,
) -> Tensor:
    """``scale[e] · A[e] x[m]``, ``[M, R]`` in ``adapter_dtype``, for ``x [M, K]``; ``A [E, R, K]`` may have any strides and dtype.

    Rows without an adapter are not written.
    """
    (M, K), R, x = x.shape, A.shape[1], readable(x)
    c = config or GroupedShrinkConfig.choose(
        *(M, K, R),
        block=table.block,
        itemsize=x.element_size(),
        aligned=aligned(x),
        target=target_of(x),
    )
    steps = cdiv(cdiv(K, c.block_k), c.splits)
    splits = cdiv(cdiv(K, c.block_k), steps)
    s = x.new_empty(M, R, dtype=adapter_dtype(x, A))
    # programs that share K write float32 partial sums, which are then added in a fixed order
    partial = s if splits == 1 else x.new_empty(splits, M, R, dtype=torch.float32)
    launch(
        _kernels().grouped_shrink_kernel,
        (table.tiles.shape[0], splits),
        *(x, A, scale, table.order, table.tiles, partial),
        *(M, K, R, steps, x.stride(0), *A.stride(), partial.stride(-2)),
        HAS_SCALE=scale is not None,
        STEP=step_of(R, partial.stride(-2)),
        STEP_A=step_of(A.stride(2)),
        BLOCK_M=block_m(table.block),
        BLOCK_K=c.block_k,
        BLOCK_R=block_r(R),
        PRECISION=dot_precision(x.dtype, s),
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )
    if splits > 1:
        add_up(partial, s)
    return s


def grouped_expand(
    s: Tensor,
    B: Tensor,
    scale: Tensor | None,
    y: Tensor | None,
    table: Table,
    dtype: torch.dtype,
    *,
    config: GroupedExpandConfig | None = None,
) -> Tensor:
    """``y[m] + scale[e] · B[e] s[m]``, ``[M, N]`` in ``dtype``. Rows without an adapter are ``y``, or 0 if there is no ``y``."""
    (M, R), N = s.shape, B.shape[1]
    y, out = None if y is None else readable(y), s.new_empty(M, N, dtype=dtype)
    c = config or GroupedExpandConfig.choose(
        R, itemsize=out.element_size(), aligned=aligned(y, out)
    )
    tiles, rows_per_tile = table.tiles.shape[0], block_m(table.block)
    launch(
        _kernels().grouped_expand_kernel,
        # the programs after the table's tiles copy the rows without an adapter
        (tiles + cdiv(M, rows_per_tile), cdiv(N, c.block_n)),
        *(s, B, scale, y, table.order, table.tiles, table.adapted, out),
        *(M, N, R, tiles, s.stride(0), *B.stride()),
        *(0 if y is None else y.stride(0), out.stride(0)),
        HAS_SCALE=scale is not None,
        HAS_Y=y is not None,
        STEP=step_of(R, s.stride(0)),
        STEP_B=step_of(B.stride(1)),
        BLOCK_M=rows_per_tile,
        BLOCK_N=c.block_n,
        BLOCK_R=block_r(R),
        PRECISION=dot_precision(dtype, s),
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )
    return out


def grouped_tall(
    x: Tensor,
    s: Tensor,
    scale: Tensor | None,
    out: Tensor,
    table: Table,
    *,
    config: GroupedTallConfig | None = None,
) -> None:
    """Fill ``out [E, R, C]``, of any strides, with ``scale[e] · Σ s[m]ᵀ x[m]`` over the rows of each adapter."""
    C, (E, R, _), x = x.shape[1], out.shape, readable(x)
    c = config or GroupedTallConfig.choose(
        R, itemsize=x.element_size(), aligned=aligned(x), mixed=s.dtype is not x.dtype
    )
    segments = table.segments.shape[0]
    # one partial sum for each segment, so that no program adds to memory of another
    partial = x.new_empty(segments, R, C, dtype=torch.float32)
    launch(
        _kernels().grouped_tall_kernel,
        (segments, cdiv(C, c.block_c)),
        *(x, s, scale, table.order, table.segments, partial),
        *(C, R, x.stride(0), s.stride(0), partial.stride(0)),
        HAS_SCALE=scale is not None,
        STEP=step_of(R, s.stride(0)),
        BLOCK_M=c.block_m,
        BLOCK_C=c.block_c,
        BLOCK_R=block_r(R),
        PRECISION=dot_precision(x.dtype, s),
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )
    tile_r, tile_c = sum_tile(C)
    launch(
        _kernels().grouped_sum_kernel,
        (E, cdiv(R, tile_r), cdiv(C, tile_c)),
        *(partial, table.first_segment, out, R, C, partial.stride(0), *out.stride()),
        BLOCK_R=tile_r,
        BLOCK_C=tile_c,
        num_warps=4,
        num_stages=1,
    )
