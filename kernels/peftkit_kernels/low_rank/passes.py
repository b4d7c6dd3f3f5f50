"""The rank-r passes by Triton kernels: each function allocates, chooses a configuration and launches.

Inputs are rows ``[M, columns]`` of one dtype (bfloat16, float16, float32) on one device, with M > 0. Factors, s
and ds have that dtype or are float32 (``adapter_dtype``). Sums are float32, in an order that depends only on the sizes, so
equal inputs give equal bits. ``config`` replaces the configuration that would be chosen. More than ``RANK_TILE`` ranks are computed
in tiles: one launch for each, except in ``expand``, which rounds once.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkit_kernels.core.dropout import keep_scale, threshold
from peftkit_kernels.core.launch import aligned, cdiv, dot_precision, launch, step_of, target_of
from peftkit_kernels.low_rank.config import (
    RANK_TILE,
    ExpandConfig,
    GemmConfig,
    ShrinkConfig,
    TallConfig,
    block_r,
    looped_ranks,
    one_dy_pass,
    rank_tiles,
)

_SUM_TILE = 1024
"""Elements of a tile. If columns are read element by element the tile has half as many, because a whole one spills on sm_120."""


@functools.cache
def _kernels() -> Any:
    from peftkit_kernels.low_rank import kernels

    return kernels


def readable(t: Tensor) -> Tensor:
    """``t`` in a layout that the kernels can read: any stride between rows, but contiguous elements within a row."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def shrink(
    x: Tensor,
    A: Tensor,
    p: float = 0.0,
    seed: int = 0,
    *,
    scale: float = 1.0,
    out: Tensor | None = None,
    sums: Sums | None = None,
    config: ShrinkConfig | None = None,
) -> Tensor:
    """``scale · drop(x) Aᵀ``, ``[M, R]`` in the dtype of ``A [R, K]``. ``A`` may have any strides, ``out`` any row stride."""
    (M, K), R, x = x.shape, A.shape[0], readable(x)
    if R > RANK_TILE:
        s = A.new_empty(M, R) if out is None else out
        for tile in rank_tiles(R):
            rest = {"scale": scale, "sums": sums, "config": config}
            shrink(x, A[tile], p, seed, out=s[:, tile], **rest)
        return s
    c = config or ShrinkConfig.choose(
        *(M, K, R),
        itemsize=x.element_size(),
        dropout=p > 0,
        aligned=aligned(x),
        target=target_of(x),
        mixed=A.dtype is not x.dtype,
    )
    steps = cdiv(cdiv(K, c.block_k), c.splits)
    splits = cdiv(cdiv(K, c.block_k), steps)
    s = A.new_empty(M, R) if out is None else out
    # programs that share K write float32 partial sums, which are then added in a fixed order
    partial = s if splits == 1 else x.new_empty(splits, M, R, dtype=torch.float32)
    launch(
        _kernels().shrink_kernel,
        (cdiv(M, c.block_m), splits),
        *(x, A, partial, scale * keep_scale(p), seed, threshold(p)),
        *(M, K, R, steps, x.stride(0), *A.stride(), partial.stride(-2)),
        DROPOUT=p > 0,
        STEP=step_of(R, partial.stride(-2)),
        STEP_A=step_of(A.stride(1)),
        BLOCK_M=c.block_m,
        BLOCK_K=c.block_k,
        BLOCK_R=block_r(R),
        PRECISION=dot_precision(x.dtype, s),
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )
    if splits > 1:
        add_up(partial, s, sums)
    return s


def expand(
    s: Tensor,
    B: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    p: float = 0.0,
    seed: int = 0,
    out: Tensor | None = None,
    add: bool = False,
    dtype: torch.dtype | None = None,
    config: ExpandConfig | None = None,
) -> Tensor:
    """``mask ∘ (scale · s Bᵀ) + bias``, ``[M, N]``, for ``s [M, R]`` and ``B [N, R]`` of any strides.

    The mask is that of a dropout with ``p`` and ``seed`` on an ``[M, N]`` tensor, times its factor on kept elements. The result
    is written into ``out`` if given, or added to it with ``add``. Without ``out`` it is a new tensor in ``dtype`` (default: that
    of ``s``).
    """
    (M, R), N = s.shape, B.shape[0]
    y = s.new_empty(M, N, dtype=dtype) if out is None else out
    tile = looped_ranks(R)
    c = config or ExpandConfig.choose(
        tile,
        itemsize=y.element_size(),
        dropout=p > 0,
        aligned=aligned(y),
        mixed=s.dtype is not y.dtype,
    )
    launch(
        _kernels().expand_kernel,
        (cdiv(M, c.block_m), cdiv(N, c.block_n)),
        *(s, B, bias, y, scale * keep_scale(p), seed, threshold(p)),
        *(M, N, R, s.stride(0), *B.stride(), y.stride(0)),
        HAS_BIAS=bias is not None,
        DROPOUT=p > 0,
        ADD=add,
        STEP=step_of(R, s.stride(0)),
        STEP_B=step_of(B.stride(0)),
        BLOCK_M=c.block_m,
        BLOCK_N=c.block_n,
        BLOCK_R=block_r(tile),
        TILES=cdiv(R, tile),
        PRECISION=dot_precision(y.dtype, s),
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )
    return y


def grad_b_and_s(
    dy: Tensor,
    s: Tensor,
    B: Tensor,
    scale: float,
    dtype: torch.dtype,
    *,
    ds: Tensor | None = None,
    sums: Sums | None = None,
    config: TallConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """``dB = scale · dyᵀ s`` ``[N, R]`` in ``dtype`` and ``ds = scale · dy B`` ``[M, R]``, by one pass over dy if R is small.

    If ``ds`` is given, the result is written into it; it may have any row stride.
    """
    if not one_dy_pass(B.shape[1], target=target_of(dy), mixed=B.dtype is not dy.dtype):
        dB = grad_b(dy, s, scale, dtype, sums=sums, config=config)
        return dB, grad_s(dy, B, scale, out=ds, sums=sums)
    dB = dy.new_empty(B.shape, dtype=dtype)
    ds = s.new_empty(s.shape) if ds is None else ds
    _tall(dy, s, dB.t(), scale, b=B, p_out=ds, p_factor=scale, sums=sums, config=config)
    return dB, ds


def grad_s(
    dy: Tensor,
    B: Tensor,
    scale: float,
    *,
    out: Tensor | None = None,
    sums: Sums | None = None,
) -> Tensor:
    """``scale · dy B``, ``[M, R]``, written into ``out`` if given."""
    return shrink(dy, B.t(), scale=scale, out=out, sums=sums)


def grad_b(
    dy: Tensor,
    s: Tensor,
    scale: float,
    dtype: torch.dtype,
    *,
    sums: Sums | None = None,
    config: TallConfig | None = None,
) -> Tensor:
    """``scale · dyᵀ s``, ``[N, R]`` in ``dtype``."""
    dB = dy.new_empty(dy.shape[1], s.shape[1], dtype=dtype)
    _tall(dy, s, dB.t(), scale, sums=sums, config=config)
    return dB


def grad_a(
    ds: Tensor,
    x: Tensor,
    dtype: torch.dtype,
    p: float = 0.0,
    seed: int = 0,
    *,
    sums: Sums | None = None,
    config: TallConfig | None = None,
) -> Tensor:
    """``dsᵀ drop(x)``, ``[R, K]`` in ``dtype``."""
    dA = x.new_empty(ds.shape[1], x.shape[1], dtype=dtype)
    _tall(x, ds, dA, 1.0, p=p, seed=seed, sums=sums, config=config)
    return dA


def gemm_lora(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    B: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    p: float = 0.0,
    seed: int = 0,
    config: GemmConfig | None = None,
) -> Tensor:
    """``x Wᵀ + mask ∘ (scale · s Bᵀ) + bias`` with one rounding, for R up to ``RANK_TILE``.

    ``weight [N, K]`` and ``B [N, R]`` may have any strides.
    """
    (M, K), N, R, x = x.shape, weight.shape[0], s.shape[1], readable(x)
    y = x.new_empty(M, N)
    c = config or GemmConfig.choose(R, aligned=aligned(x, weight, y), mixed=s.dtype is not x.dtype)
    launch(
        _kernels().gemm_lora_kernel,
        (cdiv(M, c.block_m) * cdiv(N, c.block_n),),
        *(x, weight, s, B, bias, y, scale * keep_scale(p), seed, threshold(p)),
        *(M, N, K, R, x.stride(0), *weight.stride(), s.stride(0), *B.stride(), y.stride(0)),
        HAS_BIAS=bias is not None,
        DROPOUT=p > 0,
        STEP=step_of(R, s.stride(0)),
        STEP_B=step_of(B.stride(0)),
        BLOCK_M=c.block_m,
        BLOCK_N=c.block_n,
        BLOCK_K=c.block_k,
        BLOCK_R=block_r(R),
        GROUP=c.group,
        PRECISION=dot_precision(x.dtype, s),
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )
    return y


def _tall(
    x: Tensor,
    s: Tensor,
    g_out: Tensor,
    g_factor: float,
    *,
    b: Tensor | None = None,
    p_out: Tensor | None = None,
    p_factor: float = 1.0,
    p: float = 0.0,
    seed: int = 0,
    sums: Sums | None = None,
    config: TallConfig | None = None,
) -> None:
    """Fill ``g_out [R, C] = g_factor · sᵀ drop(x)`` and, with ``b [C, R]``, ``p_out [M, R] = p_factor · x b``."""
    (M, C), R, x = x.shape, s.shape[1], readable(x)
    if R > RANK_TILE:
        assert b is None, "one pass over dy computes both gradients only up to one tile"
        rest = {"p": p, "seed": seed, "sums": sums, "config": config}
        for tile in rank_tiles(R):
            _tall(x, s[:, tile], g_out[tile], g_factor, **rest)
        return
    c = config or TallConfig.choose(
        *(M, C, R),
        itemsize=x.element_size(),
        dropout=p > 0,
        with_p=b is not None,
        aligned=aligned(x),
        target=target_of(x),
        mixed=s.dtype is not x.dtype,
    )
    chunks, blocks = cdiv(M, c.chunk_m), cdiv(C, c.block_c)
    # g has one partial sum for each chunk of rows, p one for each block of columns
    g = g_out if chunks == 1 else x.new_empty(chunks, R, C, dtype=torch.float32)
    partial_p = p_out
    if p_out is not None and blocks > 1:
        partial_p = x.new_empty(blocks, M, R, dtype=torch.float32)
    p_row_stride = 0 if partial_p is None else partial_p.stride(-2)
    launch(
        _kernels().tall_kernel,
        (chunks, blocks),
        *(x, s, b, g, partial_p, g_factor * keep_scale(p), p_factor, seed, threshold(p)),
        *(M, C, R, c.chunk_m, x.stride(0), s.stride(0), *((0, 0) if b is None else b.stride())),
        *(0 if chunks == 1 else g.stride(0), *g.stride()[-2:]),
        p_row_stride,
        WITH_P=b is not None,
        DROPOUT=p > 0,
        STEP=step_of(R, s.stride(0), p_row_stride),
        STEP_B=1 if b is None else step_of(b.stride(0)),
        BLOCK_M=c.block_m,
        BLOCK_C=c.block_c,
        BLOCK_R=block_r(R),
        PRECISION=dot_precision(x.dtype, s),
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )
    own = Sums() if sums is None else sums
    if chunks > 1:
        own.add(g, g_out)
    if p_out is not None and partial_p is not None and blocks > 1:
        own.add(partial_p, p_out)
    if sums is None:
        own.finish()


def sum_tile(columns: int) -> tuple[int, int]:
    """Rows and columns of one tile of a sum over partial results."""
    elements = _SUM_TILE // (2 if columns % 16 else 1)
    block_n = min(elements, max(16, 1 << (columns - 1).bit_length()))
    return elements // block_n, block_n


class Sums:
    """Sums over partial results that are computed together, by one launch for up to six of them.

    A pass that gets a ``Sums`` leaves its own sums to it: its results are undefined until ``finish``. Results and partial results
    must not overlap.
    """

    _MOST = 6
    """How many sums the kernel has arguments for."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def add(self, partial: Tensor, out: Tensor) -> None:
        """Let ``out [rows, columns] = Σ partial`` over the first axis of ``partial``, ``Float32[count, rows, columns]``, contiguous."""
        self._pairs.append((partial, out))

    def finish(self) -> None:
        """Compute all sums."""
        pairs, self._pairs = self._pairs, []
        for start in range(0, len(pairs), self._MOST):
            self._launch(pairs[start : start + self._MOST])

    def _launch(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        sums = [_sum_of(*pair) for pair in pairs]
        ends, end = [], 0
        for one in sums:
            end += cdiv(one.rows, one.block_m) * cdiv(one.columns, one.block_n)
            ends.append(end)
        absent = self._MOST - len(sums)
        numbers = zip(
            *((one.count, one.rows, one.columns, *one.strides) for one in sums), strict=True
        )
        launch(
            _kernels().sum_kernel,
            (end,),
            *(one.partial for one in sums),
            *([None] * absent),
            *(one.out for one in sums),
            *([None] * absent),
            *(number for column in numbers for number in (*column, *[0] * absent)),
            *(*ends, *[0] * absent)[: self._MOST - 1],
            **{f"BLOCK_M{i}": one.block_m for i, one in enumerate(sums)},
            **{f"BLOCK_N{i}": one.block_n for i, one in enumerate(sums)},
            **{f"BLOCK_{axis}{i}": 1 for axis in "MN" for i in range(len(sums), self._MOST)},
            SUMS=len(sums),
            # 4 warps spill a few registers on sm_90
            num_warps=8,
            num_stages=1,
        )


class _Sum(NamedTuple):
    """One sum as the kernel computes it."""

    partial: Tensor
    out: Tensor
    count: int
    rows: int
    columns: int
    strides: tuple[int, ...]
    block_m: int
    block_n: int


def _sum_of(partial: Tensor, out: Tensor) -> _Sum:
    count, rows, columns = partial.shape
    strides = tuple(out.stride())
    if out.is_contiguous():
        # sum it as one long row: rows of 8 columns would be read element by element
        rows, columns, strides = 1, rows * columns, (0, 1)
    return _Sum(partial, out, count, rows, columns, strides, *sum_tile(columns))


def add_up(partial: Tensor, out: Tensor, sums: Sums | None = None) -> None:
    """``out [rows, columns] = Σ partial`` over its first axis, at once or with the others of ``sums``."""
    own = Sums() if sums is None else sums
    own.add(partial, out)
    if sums is None:
        own.finish()
