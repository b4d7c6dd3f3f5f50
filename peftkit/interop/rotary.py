"""Turning keys back by a number of positions, in a model whose positions are rotations of its keys (RoPE).

A score depends on the difference of two positions alone. A prefix trained in front of tokens that start at position P, such as
PEFT's, therefore has the same scores with tokens that start at 0 once its keys are turned back by P.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.errors import ContractError
from peftkit.find.modules import base_modules
from peftkit.find.points import PROBE_TOKENS, evaluating

Angles = tuple[Tensor, Tensor]
"""Cosines and sines for one position, ``[1, 1, D]`` each, of whatever layout the model uses."""


def rotations(model: nn.Module, attentions: list[str], positions: int) -> dict[str, Angles] | None:
    """The angles by which a model turns keys at a position, by attention; ``None`` for a model that does not turn keys.

    Raises:
        ContractError: Some of its attentions do and some do not.
    """
    seen: dict[str, Angles | None] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen[name] = kwargs.get("position_embeddings") or next(
                (a for a in args if isinstance(a, tuple) and len(a) == 2), None
            )

        return hook

    modules = dict(base_modules(model))
    handles = [
        modules[name].register_forward_pre_hook(record(name), with_kwargs=True)
        for name in attentions
    ]
    try:
        _keys(model, start=positions, count=1)
    finally:
        for handle in handles:
            handle.remove()
    turned = {name: angles for name, angles in seen.items() if angles is not None}
    if turned and turned.keys() != set(attentions):
        still = sorted(set(attentions) - turned.keys())
        raise ContractError(
            f"{type(modules['']).__name__} turns the keys of some attentions by their positions and not those of {still[0]}; "
            "prefixes of PEFT cannot be imported into it"
        )
    return {name: _normalised(angles) for name, angles in turned.items()} or None


def turn(module: Any, key: Tensor, angles: Angles, *, back: bool) -> Tensor:
    """Turn keys by the angles of a position, by the model's own function.

    Args:
        module: The attention; the function is ``apply_rotary_pos_emb`` of the file it is written in.
        key: ``[H_kv, T, D]``.
        angles: Of the position.
        back: The other way round.
    """
    apply = sys.modules[type(module).__module__].apply_rotary_pos_emb
    cos, sin = (part.to(key.dtype) for part in angles)
    sin = -sin if back else sin
    width = getattr(module, "rotary_ndims", None) or key.shape[-1]
    head = key[None, ..., :width]
    turned = apply(head, head, cos, sin)[1][0]
    return torch.cat([turned, key[..., width:]], -1)


def check_turning(
    model: nn.Module, attentions: list[str], angles: dict[str, Angles], by: int
) -> None:
    """Raise unless turning reproduces the model's own keys of the same tokens at positions that are ``by`` larger.

    Raises:
        ContractError: It does not, so the model does something else with positions than turning keys.
    """
    near, far = _keys(model, 0, PROBE_TOKENS), _keys(model, by, PROBE_TOKENS)
    modules = dict(base_modules(model))
    for name, at_start, moved in zip(attentions, near, far, strict=True):
        turned = turn(modules[name], at_start, angles[name], back=False)
        # half of the digits: deeper layers have rounded their inputs differently, another formula has none in common
        # (angles are computed in float32, whatever the dtype)
        eps = max(torch.finfo(moved.dtype).eps, torch.finfo(torch.float32).eps)
        limit = eps**0.5 * moved.norm()
        if (turned - moved).norm() > limit:
            raise ContractError(
                f"{name} does not turn its keys by an angle proportional to the position, so a prefix that was trained in front "
                f"of positions from {by} on cannot be moved; train one by peftkit.PrefixConfig"
            )


def _keys(model: Any, start: int, count: int) -> list[Tensor]:
    """The keys ``[H_kv, count, D]`` of some tokens at positions from ``start`` on, as the cache gets them, by layer."""
    from transformers import DynamicCache

    device = next(model.parameters()).device
    ids = torch.arange(count, device=device)[None] % model.config.get_text_config().vocab_size
    positions = torch.arange(start, start + count, device=device)[None]
    cache = DynamicCache()
    with evaluating(model), torch.no_grad():
        model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    return [layer.keys[0] for layer in layers if getattr(layer, "keys", None) is not None]


def _normalised(angles: Angles) -> Angles:
    """YaRN and others scale keys along with turning them; only the turning depends on the position."""
    cos, sin = (part.double() for part in angles)
    length = (cos.square() + sin.square()).sqrt()
    return cos / length, sin / length
