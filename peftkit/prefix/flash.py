"""Prefixes in transformers' flash attention, which masks by sequence lengths and positions only.

flash-attn aligns the causal mask to the last query and the last key, so every query attends to keys before the tokens. Each
packed sequence gets its own copy of the prefix. A sliding window would hide the prefix, so texts longer than the window are not
supported.

Source: docstrings of flash-attn 2.8; ``_flash_attention_forward`` of transformers 5.23.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def is_flash(name: str | None) -> bool:
    """Whether transformers computes the attention with this name by flash-attn or a kernel with the same interface."""
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS.get(name) is flash_attention_forward


def by_lengths(query: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the model's arguments with packed sequences described by lengths only.

    If flash attention would not treat the call as packed, the lengths and positions are removed.

    Args:
        query: ``[B, H, S, D]``.
        mask: ``[B, T]``, nonzero for tokens that are not padding. A call with a mask is not packed.
        kwargs: The arguments: lengths of the packed sequences, or positions that restart in each sequence.
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
    """Why a prefix before the keys would not be visible to every query, as a sentence, or ``None``.

    Args:
        query: ``[B, H, S, D]``.
        key: ``[B, H_kv, T, D]``, without the prefix.
        mask: ``[B, T]`` or ``None``.
        causal: Whether later tokens are hidden.
        kwargs: The result of ``by_lengths``.
    """
    from transformers.integrations import flash_attention

    queries, tokens, window = query.shape[2], key.shape[2], kwargs.get("sliding_window")
    packed = kwargs.get("cu_seq_lens_k") is not None
    if packed and len(query) > 1:
        return f"its packed sequences are in {len(query)} rows, and only one row is supported"
    if window is not None:
        longest = int(kwargs["max_length_k"]) if packed else tokens
        if longest > window:
            return f"its window of {window} tokens would hide the prefix, because the text has {longest} tokens"
    if causal and flash_attention._use_top_left_mask:
        return "this build aligns its causal mask to the first key, so a prefix would hide tokens"
    if mask is not None and not causal and queries not in (1, tokens):
        return f"it applies the padding of {tokens} keys to {queries} queries"
    return None


def in_front(
    key: Tensor, value: Tensor, prefixed: int, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return keys, values and arguments with a copy of the prefix before each packed sequence.

    ``flash_obstacle`` must have returned ``None`` for the call.

    Args:
        key: ``[B, H_kv, P + T, D]``, with the prefix once before all tokens.
        value: ``[B, H_kv, P + T, D_v]``, likewise.
        prefixed: ``P``.
        kwargs: The result of ``by_lengths``. The sliding window covers all tokens but perhaps not the prefix, so the result has
            no window.
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
    # places 0 to P - 1 of each sequence copy the prefix, at the start of the keys; a token's index is shifted by the tokens of
    # the sequences before its own
    order = place + starts[sequence] * (place >= prefixed)
    kwargs |= {"cu_seq_lens_k": moved, "max_length_k": kwargs["max_length_k"] + prefixed}
    return key.index_select(2, order), value.index_select(2, order), kwargs
