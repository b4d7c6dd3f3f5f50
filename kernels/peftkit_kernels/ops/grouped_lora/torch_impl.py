"""``grouped_lora`` from torch ops: batched products over the tiles of a plan; their number does not depend on that of adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core.autograd import once_differentiable
from peftkit_kernels.low_rank import adapter_dtype, blocks, cast, rows, unflatten
from peftkit_kernels.ops.grouped_lora.plan import GroupPlan


def to_tiles(x: Tensor, plan: GroupPlan) -> Tensor:
    """The rows of ``x [M, K]`` in the places of the plan, ``[T, block, K]``; unfilled places repeat a row of their tile."""
    return x.index_select(0, plan.rows.view(-1)).view(*plan.rows.shape, x.shape[1])


def from_tiles(tiles: Tensor, plan: GroupPlan) -> Tensor:
    """The reverse of ``to_tiles``: ``[M, K]``, with zeros in rows without an adapter."""
    found = tiles.reshape(-1, tiles.shape[2]).index_select(0, plan.place)
    return found.masked_fill_((plan.ids < 0)[:, None], 0.0)


def factors(stacked: Tensor, plan: GroupPlan, dtype: torch.dtype) -> Tensor:
    """The factor of every tile, ``[T, ...]``; an unused tile has the factor of adapter 0."""
    return cast(stacked, dtype).index_select(0, plan.tiles[:, 0].clamp(min=0))


def over_tiles(partial: Tensor, plan: GroupPlan, like: Tensor) -> Tensor:
    """Partial gradients of tiles, summed by adapter in the order of tiles: ``[E, ...]`` in the dtype of ``like``."""
    adapter = plan.tiles[:, 0]
    # unused tiles, which may hold any values, are summed into an extra entry that is cut off
    adapter = torch.where(adapter < 0, plan.adapters, adapter)
    total = partial.new_zeros(plan.adapters + 1, *partial.shape[1:])
    return cast(total.index_add_(0, adapter, partial)[: plan.adapters], like.dtype)


def product(tiles: Tensor, factors: Tensor) -> Tensor:
    """``tile @ factor`` for every tile, in the dtype of the factors; 16-bit tiles are cast a few at a time."""
    if tiles.dtype is factors.dtype:
        return torch.bmm(tiles, factors)
    T, block, _ = tiles.shape
    out = factors.new_empty(T, block, factors.shape[2])
    for part in blocks(tiles.flatten(1)):
        torch.bmm(tiles[part].to(factors.dtype), factors[part], out=out[part])
    return out


def outer(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``leftᵀ right`` for every tile, in the widest of the dtypes of both and of the gradient."""
    wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), dtype)
    return torch.bmm(cast(left, wide).transpose(1, 2), cast(right, wide))


class GroupedLoRA(torch.autograd.Function):
    """The chain rule of ``lora_linear`` in every tile; ``dA`` and ``dB`` are summed over the tiles of an adapter."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Tensor, plan: GroupPlan
    ) -> Tensor:
        dtype = adapter_dtype(x, A)
        s = product(to_tiles(rows(x), plan), factors(A, plan, dtype).transpose(1, 2))
        factor = scale.to(dtype)[plan.tiles[:, 0].clamp(min=0), None, None]
        update = torch.bmm(s * factor, factors(B, plan, dtype).transpose(1, 2))
        out = cast(from_tiles(update, plan).add_(rows(y)), y.dtype)
        _, _, needs_A, needs_B, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_A else None, s if needs_B else None, A, B, factor)
        ctx.plan, ctx.shape = plan, x.shape
        return unflatten(out, y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, s, A, B, factor = ctx.saved_tensors
        plan = ctx.plan
        needs_y, needs_x, needs_A, needs_B, _, _ = ctx.needs_input_grad
        dx = dA = dB = None
        if needs_x or needs_A or needs_B:
            tiles = to_tiles(rows(dy), plan)
            if needs_B:
                # an unfilled place repeats a row, which must not be counted twice
                inside = s.masked_fill(~plan.filled[..., None], 0.0) * factor
                dB = over_tiles(outer(tiles, inside, B.dtype), plan, B)
        if needs_x or needs_A:
            ds = product(tiles, factors(B, plan, factor.dtype)) * factor
            if needs_x:
                dx = from_tiles(torch.bmm(ds, factors(A, plan, ds.dtype)), plan)
                dx = cast(dx, dy.dtype).view(ctx.shape)
            if needs_A:
                inside = ds.masked_fill(~plan.filled[..., None], 0.0)
                dA = over_tiles(outer(inside, to_tiles(rows(x), plan), A.dtype), plan, A)
        return dy if needs_y else None, dx, dA, dB, None, None
