"""A KV prefix, the place where the prefixes of one attention live, and the attention call with them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.own_attention import OwnAttention

CHILD = "kv_prefix"
IMPLEMENTATION = "peftkit_prefix"
RECORD = "_peftkit_record"
"""Name under which an attention module keeps a list while the keys and values of a text are recorded."""

_SHARED_SOFTMAX = ("sdpa", "eager", "peftkit_sdpa")
"""Functions that take any mask; the others mask by lengths or windows, which would also hide the prefix."""


class Prefix(nn.Module):
    """Keys and values of one adapter in one attention.

    Args:
        kv_heads: Heads of keys and values, before any are repeated.
        num_virtual_tokens: Number of keys.
        key_size: Features of a key.
        value_size: Features of a value.
        std: Standard deviation of the initial numbers.
        gated_heads: Heads of the queries, to add the prefix's own attention times a gate that starts at zero; ``None`` to let
            the prefix share the softmax of the tokens.
        device: Of the new parameters.
        dtype: Of the new parameters.
    """

    peftkit_adapter = True

    def __init__(
        self,
        kv_heads: int,
        num_virtual_tokens: int,
        key_size: int,
        value_size: int,
        std: float,
        gated_heads: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.key = nn.Parameter(torch.randn(kv_heads, num_virtual_tokens, key_size, **place) * std)
        self.value = nn.Parameter(
            torch.randn(kv_heads, num_virtual_tokens, value_size, **place) * std
        )
        self.gate = None if gated_heads is None else nn.Parameter(torch.zeros(gated_heads, **place))


class PrefixSite(nn.Module):
    """Child of an attention module; one prefix a name, all in use."""

    peftkit_adapter = True

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()

    def chosen(self) -> list[Any]:
        """The prefixes that take part in a forward."""
        return list(self.adapters.values())

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Put the prefixes in front of keys and values, and compute the attention of those with a gate.

        Args:
            query: ``[B, H, S, D]``.
            key: ``[B, H_kv, T, D]``.
            value: ``[B, H_kv, T, D_v]``.
            scale: Factor on the scores.
            softcap: Bound on the scores, for models that have one.

        Returns:
            ``key`` and ``value`` with the prefixes without a gate in front, and ``[B, S, H, D_v]``, what those with one add.

        Raises:
            ValueError: A prefix is not of the shape of the keys.
        """
        keys, values, extra = [], [], None
        for prefix in self.chosen():
            if prefix.key.shape[0] != key.shape[1] or prefix.key.shape[2] != key.shape[3]:
                raise ValueError(
                    f"the prefix has {prefix.key.shape[0]} heads of {prefix.key.shape[2]} features, the keys of this attention "
                    f"{key.shape[1]} of {key.shape[3]}; leave the module out by exclude_modules"
                )
            pk, pv = prefix.key.to(key.dtype), prefix.value.to(value.dtype)
            if prefix.gate is None:
                keys.append(pk.expand(key.shape[0], -1, -1, -1))
                values.append(pv.expand(key.shape[0], -1, -1, -1))
            else:
                part = gated_attention(query, pk, pv, prefix.gate, scale, softcap)
                extra = part if extra is None else extra + part
        if keys:
            key, value = torch.cat([*keys, key], 2), torch.cat([*values, value], 2)
        return key, value, extra


class PrefixAttention(OwnAttention):
    """Mixed into an attention module's own class: the attention call passes through its prefixes."""

    peftkit_dispatch = IMPLEMENTATION


def gated_attention(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """``tanh(gate) · softmax(scale q kᵀ) v`` over the prefix alone.

    Args:
        query: ``[B, H, S, D]``.
        key: ``[H_kv, P, D]``.
        value: ``[H_kv, P, D_v]``.
        gate: ``[H]``.
        scale: Factor on the scores.
        softcap: Bound on the scores, or ``None``.

    Returns:
        ``[B, S, H, D_v]``.
    """
    groups = query.shape[1] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = scale * (query @ key.transpose(1, 2))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(value.dtype)
    opened = torch.tanh(gate)[:, None, None].to(value.dtype)
    return (opened * (weights @ value)).transpose(1, 2)


def prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of a module with prefixes: theirs in front, then the function the model's config names.

    Raises:
        NotImplementedError: A prefix without a gate meets a function whose masks would hide it.
    """
    name = module.peftkit_function()
    modeling = sys.modules[
        type(module).__module__
    ]  # that of the own class; classes swapped in keep it
    function = modeling.ALL_ATTENTION_FUNCTIONS.get_interface(
        name, getattr(modeling, "eager_attention_forward", None)
    )
    record = module.__dict__.get(RECORD)
    site = module.kv_prefix
    if record is not None:
        record.append((key, value))
    if record is not None or not site.chosen():
        return function(module, query, key, value, attention_mask, *args, **kwargs)

    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    tokens = key.shape[2]
    key, value, extra = site(query, key, value, scale, kwargs.get("softcap"))
    prefixed = key.shape[2] - tokens
    if prefixed:
        if name not in _SHARED_SOFTMAX or kwargs.get("cache") is not None:
            raise NotImplementedError(
                f"a prefix without a gate cannot run in {name!r} attention, whose masks would hide it; load the model with "
                "attn_implementation='sdpa', or use PrefixConfig(gate=True), which runs in any"
            )
        attention_mask = _mask(module, query, tokens, prefixed, attention_mask, name, kwargs)
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = nn.functional.pad(kwargs["position_bias"], (prefixed, 0))
        if name != "eager":
            kwargs["is_causal"] = False  # the mask says all of it
    output, weights = function(module, query, key, value, attention_mask, *args, **kwargs)
    return output if extra is None else output + extra, weights


def _mask(
    module: Any,
    query: Tensor,
    tokens: int,
    prefixed: int,
    mask: Tensor | None,
    name: str,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """The mask over prefix and tokens: the prefix is always seen, the tokens are as they were."""
    if mask is not None:
        seen = True if mask.dtype is torch.bool else 0.0
        return torch.cat([mask.new_full((*mask.shape[:-1], prefixed), seen), mask], -1)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    queries = query.shape[2]
    if name == "eager" or not causal or queries == 1:
        return None
    # what sdpa does by is_causal=True: aligned at the first token, also where a static cache is longer than the queries
    seen = torch.ones(queries, tokens, dtype=torch.bool, device=query.device).tril()
    return torch.cat([seen.new_ones(queries, prefixed), seen], 1)[None, None]
