"""Attention masks for keys with a prefix before the tokens. The prefix is visible to every query."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

_WIDENED = "_peftkit_widened"
"""Attribute of a block mask: the widened masks by prefix length, so that all layers share them."""


def widen(mask: Any, prefixed: int) -> Any:
    """Extend a mask by ``prefixed`` keys before the others, visible to every query.

    Args:
        mask: A tensor whose last axis is the keys, or flex attention's ``BlockMask``. A bool or integer tensor is True or 1 for
            visible keys; a floating-point tensor is added to the scores.
        prefixed: Number of keys to add.

    Returns:
        A mask of the same kind. For a ``BlockMask``, the result is cached on the mask: the same mask and length give the same
        object.
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
    """Compute the widened block mask from the old blocks; no mask of single keys is formed for any length.

    The prefix shifts the tokens, by a number that need not be a multiple of the block size. A new block thus has tokens of up
    to two old blocks. It is skipped if both old blocks were skipped and it has no part of the prefix. It needs no ``mask_mod``
    if each of the two old blocks needed none or is prefix.
    """
    queries, tokens = mask.seq_lengths
    rows, size = mask.BLOCK_SIZE
    keys, device = prefixed + tokens, mask.kv_indices.device
    begin = torch.arange(0, keys, size, device=device)
    # index of the old block of each new block's first and last key; negative for the prefix
    ends = (begin - prefixed) // size, ((begin + size).clamp(max=keys) - 1 - prefixed) // size

    def of_both(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``blocks`` at the first and the last key of each new block, ``Bool[B, H, rows, columns]``; True for prefix."""
        first, last = ((end < 0) | blocks[..., end.clamp(min=0)] for end in ends)
        return first, last

    first, last = of_both(mask.to_dense().bool())
    seen = first | last
    full = torch.zeros_like(seen)
    if mask.full_kv_num_blocks is not None:
        full_blocks = BlockMask.from_kv_blocks(
            mask.full_kv_num_blocks, mask.full_kv_indices, BLOCK_SIZE=mask.BLOCK_SIZE
        )
        first, last = of_both(full_blocks.to_dense().bool())
        # as in torch, a block that ends beyond the last query or key never counts as full
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
    """Return the number of True columns in each row, and the column indices with the True ones first, as in ``BlockMask``."""
    blocks = blocks.int()
    order = blocks.argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()


def _behind_prefix(mask_mod: Callable[..., Tensor], prefixed: int) -> Callable[..., Tensor]:
    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # keys of the prefix have no token index, but a mask_mod may index a tensor by the token, so the index must be valid
        token = (key - prefixed).clamp(min=0)
        return (key < prefixed) | mask_mod(batch, head, query, token)

    return seen
