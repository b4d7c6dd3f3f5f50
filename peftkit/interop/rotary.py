"""Rotate keys back by a number of positions, in a model with rotary position embeddings (RoPE).

With RoPE, a score depends only on the difference of two positions. PEFT trains a prefix with tokens that start at position P.
If the prefix's keys are rotated back by P positions, tokens that start at position 0 have the same scores.
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
"""Cosines and sines of one position, ``[1, 1, D]`` each, in the layout that the model uses."""


def rotations(model: nn.Module, attentions: list[str], positions: int) -> dict[str, Angles] | None:
    """Return the angles by which each attention rotates a key at one position.

    Args:
        model: A transformers model.
        attentions: Names of its attention modules.
        positions: The position.

    Returns:
        The angles by the names of the attentions, or ``None`` if the model does not rotate its keys.

    Raises:
        ContractError: Some of the attentions rotate their keys and others do not.
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
        without = sorted(set(attentions) - turned.keys())
        raise ContractError(
            f"{type(modules['']).__name__} rotates the keys of some attentions by position, but not those of {without[0]}, so "
            "PEFT's prefixes cannot be imported; train a prefix with peftkit.PrefixConfig"
        )
    return {name: _normalised(angles) for name, angles in turned.items()} or None


def turn(module: Any, key: Tensor, angles: Angles, *, back: bool) -> Tensor:
    """Rotate keys by the angles of one position, with the model's own function.

    Args:
        module: The attention module. The function is ``apply_rotary_pos_emb`` of the Python module that defines its class.
        key: ``[H_kv, T, D]``.
        angles: The angles of the position.
        back: Rotate in the opposite direction.

    Returns:
        ``[H_kv, T, D]``.
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
    """Check that rotating keys by ``by`` positions gives the keys that the model itself computes at these positions.

    Raises:
        ContractError: The keys differ, so the model does more with positions than rotate its keys.
    """
    near, far = _keys(model, 0, PROBE_TOKENS), _keys(model, by, PROBE_TOKENS)
    modules = dict(base_modules(model))
    for name, at_start, moved in zip(attentions, near, far, strict=True):
        turned = turn(modules[name], at_start, angles[name], back=False)
        # Half of the digits have to agree: deeper layers get inputs that were rounded differently, but with another formula
        # no digits agree. Models compute the angles in float32 for every dtype.
        eps = max(torch.finfo(moved.dtype).eps, torch.finfo(torch.float32).eps)
        limit = eps**0.5 * moved.norm()
        if (turned - moved).norm() > limit:
            raise ContractError(
                f"{name} does not rotate its keys by an angle proportional to the position, so a prefix that was trained with "
                f"tokens from position {by} on cannot be imported; train a prefix with peftkit.PrefixConfig"
            )


def _keys(model: Any, start: int, count: int) -> list[Tensor]:
    """Return the keys ``[H_kv, count, D]`` that each layer writes to the cache for tokens at positions from ``start`` on."""
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
    """Remove the length from the angles: YaRN and others also scale keys, by a factor that does not depend on the position."""
    cos, sin = (part.double() for part in angles)
    length = (cos.square() + sin.square()).sqrt()
    return cos / length, sin / length
