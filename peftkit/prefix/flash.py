"""Keys with a prefix in front in transformers' flash attention, which masks by lengths: what they can say, and what they cannot.

The causal mask of flash-attn ends at the last query and the last key, so every query sees whatever lies in front of the tokens.
Packed sequences get a prefix each; a window would hide it.

Source: docstrings of flash-attn 2.8; ``_flash_attention_forward`` of transformers 5.23.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def is_flash(name: str | None) -> bool:
    """Whether transformers computes the attention of that name by flash-attn or a kernel with its interface."""
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS.get(name) is flash_attention_forward


def by_lengths(query: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The model's arguments with packed sequences told by lengths alone, or not at all where flash attention would not look.

    Args:
        query: ``[B, H, S, D]``.
        mask: ``[B, T]``, which tokens are no padding; with it nothing is packed.
        kwargs: Lengths of packed sequences, or positions that start anew in each.
    """
    from transformers.modeling_flash_attention_utils import (
        _is_packed_sequence,
        prepare_fa_kwargs_from_position_ids,
    )

    positions, packing = kwargs.get("position_ids"), [kwargs.get(name) for name in _PACKING]
    rest = {key: v for key, v in kwargs.items() if key not in (*_PACKING, "position_ids")}
    if mask is not None:
        return rest
    if any(part is None for part in packing):
        if not _is_packed_sequence(positions, query.shape[0]):
            return rest
        starts, longest = prepare_fa_kwargs_from_position_ids(positions)
        packing = *starts, *longest
    return rest | dict(zip(_PACKING, packing, strict=True))


def flash_obstacle(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, kwargs: dict[str, Any]
) -> str | None:
    """Why a prefix in front of the keys would not be seen by every query, as a sentence, or ``None``.

    Args:
        query: ``[B, H, S, D]``.
        key: ``[B, H_kv, T, D]``, without the prefix.
        mask: ``[B, T]`` or ``None``.
        causal: Whether later tokens are hidden.
        kwargs: As by ``by_lengths``.
    """
    from transformers.integrations import flash_attention

    queries, tokens, window = query.shape[2], key.shape[2], kwargs.get("sliding_window")
    packed = kwargs.get("cu_seq_lens_k") is not None
    if packed and len(query) > 1:
        return f"its packed sequences lie in {len(query)} rows"
    if window is not None:
        longest = int(kwargs["max_length_k"]) if packed else tokens
        if longest > window:
            return (
                f"its window of {window} tokens, less than the {longest} there are, would hide it"
            )
    if causal and flash_attention._use_top_left_mask:
        return "this build aligns its causal mask to the first key, which hides tokens instead"
    if mask is not None and not causal and queries not in (1, tokens):
        return f"it takes the padding of {tokens} keys for that of {queries} queries"
    return None


def in_front(
    key: Tensor, value: Tensor, prefixed: int, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Keys, values and arguments of a call without an obstacle, with the prefix in front of each sequence.

    Args:
        key: ``[B, H_kv, P + T, D]``, with the prefix in front.
        value: ``[B, H_kv, P + T, D_v]``.
        prefixed: ``P``.
        kwargs: As by ``by_lengths``; the window reaches all tokens, but perhaps not all keys.
    """
    kwargs = kwargs | {"sliding_window": None}
    starts = kwargs.get("cu_seq_lens_k")
    if starts is None:
        return key, value, kwargs
    like: dict[str, Any] = {"dtype": starts.dtype, "device": starts.device}
    moved = starts + prefixed * torch.arange(len(starts), **like)
    places = torch.arange(key.shape[2] + prefixed * (len(starts) - 2), **like)
    sequence = torch.searchsorted(moved, places, right=True) - 1
    place = places - moved[sequence]
    # the prefix is taken from the front each time, a token from behind the prefix and the sequences before its own
    order = place + starts[sequence] * (place >= prefixed)
    kwargs |= {"cu_seq_lens_k": moved, "max_length_k": kwargs["max_length_k"] + prefixed}
    return key.index_select(2, order), value.index_select(2, order), kwargs
