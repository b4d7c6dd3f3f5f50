"""Masks of attention over joined keys: the prefix lies in front of the tokens, and every query sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

_WIDENED = "_peftkit_widened"
"""Name under which a block mask keeps what it was widened to, by the length of the prefix: its layers share it."""


def widen(mask: Any, prefixed: int) -> Any:
    """The mask of the same attention with ``prefixed`` keys in front that every query sees.

    Args:
        mask: A tensor with the keys in its last axis, bool (seen), integer (1 is seen) or added to the scores; or flex attention's
            ``BlockMask``.
        prefixed: Number of keys in front.

    Returns:
        A mask of the same kind. One block mask and length give the same object again, for as long as that mask lives.
    """
    if not isinstance(mask, BlockMask):
        seen = 0 if mask.is_floating_point() else 1
        return torch.cat([mask.new_full((*mask.shape[:-1], prefixed), seen), mask], -1)
    if torch.compiler.is_compiling():
        return _widen_blocks(mask, prefixed)
    known = mask.__dict__.setdefault(_WIDENED, {})
    if prefixed not in known:
        known[prefixed] = _widen_blocks(mask, prefixed)
    return known[prefixed]


def _widen_blocks(mask: BlockMask, prefixed: int) -> BlockMask:
    """From the blocks alone: no mask of single keys is made, whatever the lengths.

    The prefix moves the tokens by a part of a block, so a new block holds tokens of up to two old ones: it is skipped where both
    were and no prefix lies in it, and goes without ``mask_mod`` where both did or are prefix.
    """
    queries, tokens = mask.seq_lengths
    rows, size = mask.BLOCK_SIZE
    keys, device = prefixed + tokens, mask.kv_indices.device
    begin = torch.arange(0, keys, size, device=device)
    # the old blocks of a new one's first and last token; below zero is prefix
    ends = (begin - prefixed) // size, ((begin + size).clamp(max=keys) - 1 - prefixed) // size

    def of_both(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """``Bool[B, H, rows, columns]`` of the first and the last token of each new block, the prefix as seen."""
        first, last = ((end < 0) | blocks[..., end.clamp(min=0)] for end in ends)
        return first, last

    first, last = of_both(mask.to_dense().bool())
    seen = first | last
    full = torch.zeros_like(seen)
    if mask.full_kv_num_blocks is not None:
        whole = BlockMask.from_kv_blocks(
            mask.full_kv_num_blocks, mask.full_kv_indices, BLOCK_SIZE=mask.BLOCK_SIZE
        )
        first, last = of_both(whole.to_dense().bool())
        # like torch's own, a block that ends outside the queries or keys is never whole
        inside = torch.arange(rows, rows * full.shape[-2] + 1, rows, device=device) <= queries
        full = first & last & inside[:, None] & (begin + size <= keys)
    return BlockMask.from_kv_blocks(
        *_ordered(seen & ~full),
        *_ordered(full),
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=_behind_prefix(mask.mask_mod, prefixed),
        seq_lengths=(queries, keys),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Number of the true columns of each row, and the columns with those in front, as block masks keep them."""
    blocks = blocks.int()
    order = blocks.argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()


def _behind_prefix(mask_mod: Callable[..., Tensor], prefixed: int) -> Callable[..., Tensor]:
    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # a prefix has no place among the tokens; a mask that looks its key up still needs one that exists
        token = (key - prefixed).clamp(min=0)
        return (key < prefixed) | mask_mod(batch, head, query, token)

    return seen
