"""Keys with a prefix in front in transformers' flash attention, which masks by lengths: what they can say, and what they cannot.

The causal mask of flash-attn ends at the last query and the last key, so every query sees whatever lies in front of the tokens.
A window or the lengths of packed sequences would hide it.

Source: docstring of ``flash_attn_func``; ``_flash_attention_forward`` of transformers 5.23.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_flash(name: str | None) -> bool:
    """Whether transformers computes the attention of that name by flash-attn or a kernel with its interface."""
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS.get(name) is flash_attention_forward


def flash_obstacle(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, kwargs: dict[str, Any]
) -> str | None:
    """Why a prefix in front of the keys would not be seen by every query, as a sentence, or ``None``.

    Args:
        query: ``[B, H, S, D]``.
        key: ``[B, H_kv, T, D]``, without the prefix.
        mask: ``[B, T]``, which tokens are no padding; or ``None``.
        causal: Whether later tokens are hidden.
        kwargs: What the model passes beside them.
    """
    from transformers.integrations import flash_attention
    from transformers.modeling_flash_attention_utils import _is_packed_sequence

    queries, tokens, window = query.shape[2], key.shape[2], kwargs.get("sliding_window")
    if window is not None and tokens > window:
        return f"its window of {window} tokens, less than the {tokens} there are, would hide it"
    if kwargs.get("cu_seq_lens_q") is not None or kwargs.get("cu_seq_lens_k") is not None:
        return "only the first of packed sequences (cu_seq_lens_q) would see it"
    if mask is None and _is_packed_sequence(kwargs.get("position_ids"), query.shape[0]):
        return "only the first of packed sequences (position_ids) would see it"
    if causal and flash_attention._use_top_left_mask:
        return "this build aligns its causal mask to the first key, which hides tokens instead"
    if mask is not None and not causal and queries not in (1, tokens):
        return f"it takes the padding of {tokens} keys for that of {queries} queries"
    return None


def without_limits(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The model's arguments where ``flash_obstacle`` is ``None``, less those that were found not to matter.

    The window reaches all tokens, but perhaps not all keys; positions are there to tell packed sequences, of which there are none.
    """
    return kwargs | {"sliding_window": None, "position_ids": None}
