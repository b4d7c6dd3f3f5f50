"""The attention call of a module with prefixes: one op where it can run, the model's function over joined keys elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.attention_dispatch import NATIVE, Undispatched
from peftkit.prefix.flash import by_lengths, flash_obstacle, in_front, is_flash
from peftkit.prefix.masks import widen
from peftkit_kernels.attention import native_obstacle
from peftkit_kernels.dispatch import is_transformed, triton_obstacle
from peftkit_kernels.prefix_attention import prefix_attention as merged_attention
from peftkit_kernels.prefix_attention.flash import Pass

OP = "prefix_attention"
IMPLEMENTATION = "peftkit_prefix"
RECORD = "_peftkit_record"
"""Name under which an attention module keeps a list while the keys and values of a text are recorded."""

_SDPA = ("sdpa", NATIVE)
_FLEX = "flex_attention"
_SHARED_SOFTMAX = (*_SDPA, "eager", _FLEX)
"""Functions that take any mask. Flash attention masks by lengths, which can leave a prefix seen; others are not known here."""

_OWN_TERMS = ("position_bias", "cache", "softcap", "s_aux")
"""Arguments by which a model changes its scores or keys beyond a mask."""


def prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of a module with prefixes, called as transformers calls any.

    Prefixes that share the tokens' softmax are one ``peftkit_kernels.prefix_attention`` with the keys where they lie; where
    ``obstacle`` gives a reason against it they are joined to the keys, for the function that the model's config names.
    What prefixes with a gate attend to is added to the result of either; one such prefix alone is computed in the same native
    pass where that is the model's attention (``gated_obstacle``).

    Raises:
        NotImplementedError: A prefix without a gate meets a function, or a call of one, whose masks would hide it.
        ValueError: A prefix is not of the shape of the keys.
    """
    name = module.peftkit_function()
    # that of the own class; classes swapped in keep it
    modeling = sys.modules[type(module).__module__]
    function = modeling.ALL_ATTENTION_FUNCTIONS.get_interface(
        name, getattr(modeling, "eager_attention_forward", None)
    )
    record = module.__dict__.get(RECORD)
    site = module.virtual_tokens
    caller = module if name in _SHARED_SOFTMAX else Undispatched(module)
    if record is not None:
        record.append((key, value))
    if record is not None or not site.chosen():
        return function(caller, query, key, value, attention_mask, *args, **kwargs)

    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    before, gated = site(query, key)
    arguments = query, key, value, attention_mask
    causal = _hides_later_tokens(module, query, attention_mask, kwargs)
    if before is None and len(gated) == 1:
        reason = gated_obstacle(name, causal, *arguments, *args, **kwargs)
        if query.shape[2] > 1:
            site.note(reason)
        if reason is None:
            (prefix,) = gated
            opened = torch.tanh(prefix.gate)
            part = prefix.key, prefix.value
            return _merged(query, key, value, part, attention_mask, causal, scale, opened), None
    if before is None:
        output, weights = function(caller, *arguments, *args, **kwargs)
    else:
        reason = obstacle(name, *arguments, *args, **kwargs)
        site.note(reason)
        if reason is None:
            output = _merged(query, key, value, before, attention_mask, causal, scale)
            weights = None
        else:
            output, weights = _joined(
                function, caller, name, query, key, value, before, attention_mask, args, kwargs
            )
    for prefix in gated:
        pk, pv = prefix.key.to(query.dtype), prefix.value.to(query.dtype)
        output = output + gated_attention(query, pk, pv, prefix.gate, scale, kwargs.get("softcap"))
    return output, weights


def obstacle(
    name: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    *args: Any,
    dropout: float = 0.0,
    **kwargs: Any,
) -> str | None:
    """Why prefix and tokens cannot be two merged passes in this call, as a sentence, or ``None``."""
    reason = standing_obstacle(name, query)
    if reason is not None:
        return reason
    if is_transformed():
        return "compiled or in torch.func: there one attention over joined keys is known"
    if args or dropout:
        return "attention dropout is on"
    own = [term for term in _OWN_TERMS if kwargs.get(term) is not None]
    if own:
        return f"the model passes {own[0]}"
    if key.shape != value.shape:
        return f"keys of {key.shape[3]} and values of {value.shape[3]} features"
    if mask is not None and (mask.dtype is not torch.bool or mask.dim() != 4 or mask.shape[1] != 1):
        return f"its mask is {mask.dtype} {tuple(mask.shape)}, not bool with one head"
    return Pass(1.0, mask=mask).obstacle(query)


def gated_obstacle(
    name: str | None,
    causal: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    *args: Any,
    **kwargs: Any,
) -> str | None:
    """Why the tokens and a prefix with a gate cannot be one pass in this call, as a sentence, or ``None``.

    It has to be the pass that would run without a prefix, so that a closed gate changes no bit.
    """
    reason = standing_gated_obstacle(name, query) or obstacle(
        name, query, key, value, mask, *args, **kwargs
    )
    if reason is None and causal and query.shape[2] != key.shape[2]:
        return f"{query.shape[2]} queries of {key.shape[2]} tokens"
    if reason is None and not Pass(1.0, mask=mask).is_native(query, key, value):
        return "the native passes do not take its queries or mask"
    return reason


def standing_gated_obstacle(name: str | None, like: Tensor) -> str | None:
    """The part of ``gated_obstacle`` that is known without a call; ``like`` as keys, with or without an axis for sequences."""
    if name != NATIVE:
        return f"its attention is {name}"
    like = like[None] if like.dim() == 3 else like
    return native_obstacle(like, like, like, None)


def standing_obstacle(name: str | None, like: Tensor) -> str | None:
    """The part of ``obstacle`` that is known without a call; ``like`` is a tensor of the attention's device and dtype."""
    if name not in _SHARED_SOFTMAX:
        raises = (
            "where a text longer than a sliding window raises"
            if is_flash(name)
            else "whose masks would hide them: a forward raises"
        )
        return f"the model's attention is {name}, {raises}"
    if name not in _SDPA:
        untrained = name == _FLEX and like.device.type == "cpu"
        return f"the model's attention is {name}" + (
            ", of which torch has no backward on the CPU" if untrained else ""
        )
    return None if like.device.type == "cpu" else triton_obstacle(OP, like, has_dot=False)


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


def _hides_later_tokens(
    module: Any, query: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> bool:
    """Whether ``sdpa`` would take the call as causal: aligned at the first token, also where a static cache is longer."""
    return _is_causal(module, kwargs) and mask is None and query.shape[2] > 1


def _is_causal(module: Any, kwargs: dict[str, Any]) -> bool:
    causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def _merged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    before: tuple[Tensor, Tensor],
    mask: Tensor | None,
    causal: bool,
    scale: float,
    gate: Tensor | None = None,
) -> Tensor:
    queries, tokens = query.shape[2], key.shape[2]
    if causal and tokens > queries:
        # no query sees them
        key, value = key[:, :, :queries], value[:, :, :queries]
    elif causal and tokens < queries:
        mask, causal = _triangle(queries, tokens, query.device), False
    batch, heads, _, size = query.shape
    if queries == 1:
        # the heads that share a key see the same of it: as queries of one head they read it once
        query = query.reshape(batch, key.shape[1], -1, size)
    if mask is not None:
        mask = mask.expand(batch, 1, query.shape[2], tokens)
    output = merged_attention(
        query, key, value, *before, scale, causal=causal, mask=mask, gate=gate
    )
    return output.transpose(1, 2).reshape(batch, 1, heads, size) if queries == 1 else output


def _joined(
    function: Callable[..., Any],
    module: Any,
    name: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    before: tuple[Tensor, Tensor],
    mask: Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The function itself, over keys with the prefix in front, and a mask that shows it to every query."""
    flash = name not in _SHARED_SOFTMAX and is_flash(name)
    if flash:
        kwargs = by_lengths(query, mask, kwargs)
    reason = _joining_obstacle(module, name, query, key, mask, kwargs)
    if reason is not None:
        raise NotImplementedError(
            f"a prefix without a gate cannot run in {name!r} attention: {reason}; load the model with "
            "attn_implementation='sdpa', or use PrefixConfig(gate=True), which runs in any"
        )
    queries, tokens, prefixed = query.shape[2], key.shape[2], before[0].shape[1]
    if name in _SDPA:
        if _hides_later_tokens(module, query, mask, kwargs):
            mask = _triangle(queries, tokens, query.device)
        kwargs["is_causal"] = False  # the mask says all of it
    if mask is not None:
        mask = widen(mask, prefixed)
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = nn.functional.pad(kwargs["position_bias"], (prefixed, 0))
    key, value = (
        torch.cat([part.to(own.dtype).expand(own.shape[0], -1, -1, -1), own], 2)
        for part, own in zip(before, (key, value), strict=True)
    )
    if flash:
        key, value, kwargs = in_front(key, value, prefixed, kwargs)
    return function(module, query, key, value, mask, *args, **kwargs)


def _joining_obstacle(
    module: Any, name: str | None, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
) -> str | None:
    """Why the function cannot show keys in front of the others to every query, as a sentence, or ``None``."""
    if kwargs.get("cache") is not None:
        return "its keys lie in pages"
    if name in _SHARED_SOFTMAX:
        return None
    if not is_flash(name):
        return "its masks would hide it"
    return flash_obstacle(query, key, mask, _is_causal(module, kwargs), kwargs)


def _triangle(queries: int, tokens: int, device: torch.device) -> Tensor:
    """``Bool[1, 1, S, T]``: each query sees the tokens up to its own number."""
    return torch.ones(queries, tokens, dtype=torch.bool, device=device).tril()[None, None]
