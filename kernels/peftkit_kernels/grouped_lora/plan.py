"""Which rows go with which adapter, as tiles that never mix two: made once a batch, used by every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """Rows sorted by adapter and cut into tiles. All sizes follow from ``M``, ``E`` and ``block``, never from the ids.

    Attributes:
        ids: ``Int64[M]``, the adapter of each row, -1 for none.
        order: ``Int64[M]``, the rows sorted by adapter, each adapter's in their own order, those without one last.
        tiles: ``Int64[T, 3]``: adapter, first position in ``order``, count; ``T = ceil(M / block) + E``, and those not
            needed have adapter -1 and count 0.
        rows: ``Int64[T, block]``: the rows of each tile; places beyond its count repeat its first row.
        filled: ``Bool[T, block]``: places within the count.
        place: ``Int64[M]``: where each row lies among the ``T · block`` places; 0 for a row without an adapter.
        adapters: E.
        block: Places in a tile.
    """

    ids: Tensor
    order: Tensor
    tiles: Tensor
    rows: Tensor
    filled: Tensor
    place: Tensor
    adapters: int
    block: int


def plan_groups(ids: Tensor, adapters: int, *, block: int = 16) -> GroupPlan:
    """Sort rows by adapter and cut them into tiles, on the device of ``ids`` and without waiting for it.

    Args:
        ids: ``Int[M]``, from -1 (no adapter) to ``adapters - 1``. Checked on the CPU only.
        adapters: E, at least 1.
        block: Rows in a tile.

    Raises:
        ValueError: ``ids`` is no vector of integers or names an adapter there is not, or a number is below 1.
    """
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
        raise ValueError(f"ids is {ids.dtype} {tuple(ids.shape)}; it must be integers [M]")
    if adapters < 1 or block < 1:
        raise ValueError(f"adapters={adapters} and block={block} must be at least 1")
    ids = ids.long()
    if (
        ids.device.type == "cpu"
        and ids.numel()
        and not -1 <= int(ids.min()) <= int(ids.max()) < adapters
    ):
        raise ValueError(
            f"ids run from {int(ids.min())} to {int(ids.max())}; with adapters={adapters} they must be -1 to {adapters - 1}"
        )
    M, device = ids.numel(), ids.device
    key = torch.where(ids < 0, adapters, ids)
    order = torch.argsort(key, stable=True)
    counts = torch.zeros(adapters + 1, dtype=torch.int64, device=device)
    counts.index_add_(0, key, torch.ones_like(key))
    starts = counts.cumsum(0) - counts
    per_adapter = (counts[:adapters] + block - 1) // block
    last_tile = per_adapter.cumsum(0)
    first_tile = torch.nn.functional.pad(last_tile - per_adapter, (0, 1))
    tile = torch.arange(-(-M // block) + adapters, device=device)
    adapter = torch.searchsorted(last_tile, tile, right=True)
    used = adapter < adapters
    first = starts[adapter] + (tile - first_tile[adapter]) * block
    count = (starts[adapter] + counts[adapter] - first).clamp(max=block)
    first, count = (torch.where(used, t, 0) for t in (first, count))
    tiles = torch.stack([torch.where(used, adapter, -1), first, count], 1)
    inside = torch.arange(block, device=device)
    filled = inside < count[:, None]
    position = first[:, None] + torch.where(filled, inside, 0)
    rows = order[position] if M else position
    offset = torch.arange(M, device=device) - starts[key[order]]
    place = torch.zeros_like(ids)
    place[order] = first_tile[key[order]] * block + offset
    return GroupPlan(ids, order, tiles, rows, filled, place * (ids >= 0), adapters, block)
