"""The steps of updates by adapter by torch operations: batched products over the tiles of a plan.

Their number does not depend on that of adapters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peftkit_kernels.low_rank import adapter_dtype, blocks, cast
from peftkit_kernels.ops.grouped_lora.plan import GroupPlan


class Tiles(NamedTuple):
    """The fields of a ``GroupPlan`` that these passes read, under the same names."""

    ids: Tensor
    tiles: Tensor
    rows: Tensor
    filled: Tensor
    place: Tensor


def tiles_of(plan: GroupPlan) -> Tiles:
    """The tables of ``plan``."""
    return Tiles(plan.ids, plan.tiles, plan.rows, plan.filled, plan.place)


class TorchPasses:
    """The steps of ``ops.grouped_lora.schedule``. Gathered rows, ``s`` and ``ds`` are in tiles, ``[T, block, ...]``.

    Places of a tile without a row repeat one of its rows, which must not be counted twice.
    """

    def gather(self, x: Tensor, table: Tiles) -> Tensor:
        """Rows ``x [M, K]`` as the other steps read them: in the places of the plan, ``[T, block, K]``."""
        return x.index_select(0, table.rows.view(-1)).view(*table.rows.shape, x.shape[1])

    def scales(self, scale: Tensor, table: Tiles, dtype: torch.dtype) -> Tensor:
        """The scales as the other steps read them: that of every tile, ``[T, 1, 1]`` in ``dtype``."""
        return scale.to(dtype)[table.tiles[:, 0].clamp(min=0), None, None]

    def shrink(self, x: Tensor, A: Tensor, table: Tiles) -> Tensor:
        """``s = A[e] x[m]`` for gathered rows ``x``."""
        return _product(x, _factors(A, table, adapter_dtype(x, A)).transpose(1, 2))

    def update(self, y: Tensor, s: Tensor, B: Tensor, scale: Tensor, table: Tiles) -> Tensor:
        """``y[m] + scale[e] · B[e] s[m]`` for rows ``y [M, N]``; rows without an adapter are those of ``y``."""
        update = torch.bmm(s * scale, _factors(B, table, s.dtype).transpose(1, 2))
        return cast(_from_tiles(update, table).add_(y), y.dtype)

    def grad_s(self, dy: Tensor, B: Tensor, scale: Tensor, table: Tiles) -> Tensor:
        """``ds = scale[e] · dy[m] B[e]`` for gathered rows ``dy``."""
        return _product(dy, _factors(B, table, scale.dtype)) * scale

    def grad_x(self, ds: Tensor, A: Tensor, table: Tiles, dtype: torch.dtype) -> Tensor:
        """``ds[m] A[e]``, ``[M, K]`` in ``dtype``; 0 in rows without an adapter."""
        return cast(_from_tiles(torch.bmm(ds, _factors(A, table, ds.dtype)), table), dtype)

    def grad_a(self, x: Tensor, ds: Tensor, A: Tensor, table: Tiles) -> Tensor:
        """``Σ ds[m]ᵀ x[m]`` over the rows of each adapter, for gathered rows ``x``."""
        inside = ds.masked_fill(~table.filled[..., None], 0.0)
        return _over_tiles(_outer(inside, x, A.dtype), table, A)

    def grad_b(self, dy: Tensor, s: Tensor, B: Tensor, scale: Tensor, table: Tiles) -> Tensor:
        """``scale[e] · Σ dy[m]ᵀ s[m]`` over the rows of each adapter, for gathered rows ``dy``."""
        inside = s.masked_fill(~table.filled[..., None], 0.0) * scale
        return _over_tiles(_outer(dy, inside, B.dtype), table, B)


def _from_tiles(tiles: Tensor, table: Tiles) -> Tensor:
    """The rows in their own order: ``[M, K]``, with zeros in rows without an adapter."""
    found = tiles.reshape(-1, tiles.shape[2]).index_select(0, table.place)
    return found.masked_fill_((table.ids < 0)[:, None], 0.0)


def _factors(stacked: Tensor, table: Tiles, dtype: torch.dtype) -> Tensor:
    """The factor of every tile, ``[T, ...]``; an unused tile has the factor of adapter 0."""
    return cast(stacked, dtype).index_select(0, table.tiles[:, 0].clamp(min=0))


def _over_tiles(partial: Tensor, table: Tiles, like: Tensor) -> Tensor:
    """Partial gradients of tiles, summed by adapter in the order of tiles, in the shape and dtype of ``like``."""
    adapter, adapters = table.tiles[:, 0], like.shape[0]
    # unused tiles, which may hold any values, are summed into an extra entry that is cut off
    adapter = torch.where(adapter < 0, adapters, adapter)
    total = partial.new_zeros(adapters + 1, *partial.shape[1:])
    return cast(total.index_add_(0, adapter, partial)[:adapters], like.dtype)


def _product(tiles: Tensor, factors: Tensor) -> Tensor:
    """``tile @ factor`` for every tile, in the dtype of the factors; 16-bit tiles are cast a few at a time."""
    if tiles.dtype is factors.dtype:
        return torch.bmm(tiles, factors)
    T, block, _ = tiles.shape
    out = factors.new_empty(T, block, factors.shape[2])
    for part in blocks(tiles.flatten(1)):
        torch.bmm(tiles[part].to(factors.dtype), factors[part], out=out[part])
    return out


def _outer(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``leftᵀ right`` for every tile, in the widest of the dtypes of both and of the gradient."""
    wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), dtype)
    return torch.bmm(cast(left, wide).transpose(1, 2), cast(right, wide))
