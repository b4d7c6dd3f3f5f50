"""The attention function of a module with prefixes.

If possible, one fused op computes prefix and tokens. Otherwise the prefix is concatenated with the keys, and the model's own
attention function runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.attention_dispatch import NATIVE, Undispatched
from peftkit.prefix.flash import by_lengths, flash_obstacle, in_front, is_flash
from peftkit.prefix.masks import widen
from peftkit_kernels.core.dispatch import is_transformed, triton_obstacle
from peftkit_kernels.ops.attention import native_obstacle
from peftkit_kernels.ops.prefix_attention import prefix_attention as merged_attention
from peftkit_kernels.ops.prefix_attention.flash import Pass

OP = "prefix_attention"
IMPLEMENTATION = "peftkit_prefix"
RECORD = "_peftkit_record"
"""Attribute of an attention module: a list of recorded keys and values, only set while a text is recorded."""

_SDPA = ("sdpa", NATIVE)
_FLEX = "flex_attention"
_SHARED_SOFTMAX = (*_SDPA, "eager", _FLEX)
"""Attention functions that accept any mask. Flash attention masks by lengths, which can keep a prefix visible. Other functions
are unknown."""

_OWN_TERMS = ("position_bias", "cache", "softcap", "s_aux")
"""Arguments with which a model changes its scores or keys in other ways than by a mask."""


def prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute the attention of a module with prefixes. The signature is that of transformers' attention functions.

    Prefixes without a gate share one softmax with the tokens. One call of ``peftkit_kernels.ops.prefix_attention`` computes them
    without copying the keys. If ``obstacle`` gives a reason against this call, the prefixes are concatenated with the keys, and
    the attention function that the model's config names runs.

    The output of a prefix with a gate is added to the result. If one prefix with a gate is the only prefix, the fused op
    computes prefix and tokens in one native pass, unless ``gated_obstacle`` gives a reason against it.

    Args:
        module: The attention module; its class is a ``PrefixAttention``.
        query: ``[B, H, S, D]``.
        key: ``[B, H_kv, T, D]``.
        value: ``[B, H_kv, T, D_v]``.
        attention_mask: The mask of the tokens, in the form that the model's attention function takes.
        args: Further arguments of the model's attention function.
        kwargs: Further arguments of the model's attention function.

    Returns:
        The output ``[B, S, H, D_v]``, and the attention weights if the model's function returns them.

    Raises:
        NotImplementedError: A prefix has no gate, and the masks of the model's attention function would hide the prefix.
        ValueError: The shape of a prefix does not fit the keys.
    """
    name = module.peftkit_function()
    # the Python module of the model's own class; a class that was swapped in has the same __module__
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
    """Why the fused op cannot compute this call, as a sentence, or ``None`` if it can."""
    reason = standing_obstacle(name, query)
    if reason is not None:
        return reason
    if is_transformed():
        return "torch.compile and torch.func only support one attention over the concatenated keys"
    if args or dropout:
        return "attention dropout is on"
    own = [term for term in _OWN_TERMS if kwargs.get(term) is not None]
    if own:
        return f"the model passes {own[0]}"
    if key.shape != value.shape:
        return f"the keys have {key.shape[3]} features, the values {value.shape[3]}"
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
    """Why the tokens and a prefix with a gate cannot be computed in one pass in this call, as a sentence, or ``None``.

    The pass has to be the one that would run without a prefix, so that the output is bit-identical while the gate is zero.
    """
    reason = standing_gated_obstacle(name, query) or obstacle(
        name, query, key, value, mask, *args, **kwargs
    )
    if reason is None and causal and query.shape[2] != key.shape[2]:
        return f"a causal call has {query.shape[2]} queries and {key.shape[2]} tokens"
    if reason is None and not Pass(1.0, mask=mask).is_native(query, key, value):
        return "the native passes do not support its queries or mask"
    return reason


def standing_gated_obstacle(name: str | None, like: Tensor) -> str | None:
    """Return the reason of ``gated_obstacle`` if it applies to every call, else ``None``.

    Args:
        name: Name of the attention function.
        like: A tensor with the shape, device and dtype of the keys; the batch axis may be missing.
    """
    if name != NATIVE:
        return f"its attention is {name}"
    like = like[None] if like.dim() == 3 else like
    return native_obstacle(like, like, like, None)


def standing_obstacle(name: str | None, like: Tensor) -> str | None:
    """Return the reason of ``obstacle`` if it applies to every call, else ``None``.

    Args:
        name: Name of the attention function.
        like: A tensor with the device and dtype of the attention.
    """
    if name not in _SHARED_SOFTMAX:
        raises = (
            "which raises an error if a text is longer than a sliding window"
            if is_flash(name)
            else "whose masks would hide a prefix: a forward raises an error"
        )
        return f"the model's attention is {name}, {raises}"
    if name not in _SDPA:
        no_backward = name == _FLEX and like.device.type == "cpu"
        return f"the model's attention is {name}" + (
            ", which has no backward in torch on the CPU" if no_backward else ""
        )
    return None if like.device.type == "cpu" else triton_obstacle(OP, like, has_dot=False)


def gated_attention(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Compute ``tanh(gate) · softmax(scale q kᵀ) v`` over the prefix only.

    Args:
        query: ``[B, H, S, D]``.
        key: ``[H_kv, P, D]``.
        value: ``[H_kv, P, D_v]``.
        gate: ``[H]``.
        scale: Factor of the scores.
        softcap: Scores are replaced by ``softcap · tanh(score / softcap)``; ``None`` for no cap.

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
    """Whether ``sdpa`` would apply a causal mask in this call.

    The mask is aligned to the first token, even if a static cache has more keys than there are queries.
    """
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
        # the mask hides the later keys from every query
        key, value = key[:, :, :queries], value[:, :, :queries]
    elif causal and tokens < queries:
        mask, causal = _triangle(queries, tokens, query.device), False
    batch, heads, _, size = query.shape
    if queries == 1:
        # heads that share a key become queries of one head, so that the key is read once
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
    """Call the model's attention function with the prefix before the keys, visible to every query."""
    flash = name not in _SHARED_SOFTMAX and is_flash(name)
    if flash:
        kwargs = by_lengths(query, mask, kwargs)
    reason = _joining_obstacle(module, name, query, key, mask, kwargs)
    if reason is not None:
        raise NotImplementedError(
            f"a prefix without a gate cannot run in {name!r} attention: {reason}; load the model with "
            "attn_implementation='sdpa', or use PrefixConfig(gate=True), which works with every attention function"
        )
    queries, tokens, prefixed = query.shape[2], key.shape[2], before[0].shape[1]
    if name in _SDPA:
        if _hides_later_tokens(module, query, mask, kwargs):
            mask = _triangle(queries, tokens, query.device)
        kwargs["is_causal"] = False  # the mask includes the causal part
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
    """Why the prefix would not be visible to every query in the model's attention function, as a sentence, or ``None``."""
    if kwargs.get("cache") is not None:
        return "its keys are in a paged cache"
    if name in _SHARED_SOFTMAX:
        return None
    if not is_flash(name):
        return "its masks would hide it"
    return flash_obstacle(query, key, mask, _is_causal(module, kwargs), kwargs)


def _triangle(queries: int, tokens: int, device: torch.device) -> Tensor:
    """Return a causal mask ``Bool[1, 1, S, T]``: query i attends to tokens 0 to i."""
    return torch.ones(queries, tokens, dtype=torch.bool, device=device).tril()[None, None]
