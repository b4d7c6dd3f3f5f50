"""PEFT's prefix tuning as a ``PrefixConfig`` adapter.

PEFT keeps ``prompt_embeddings [P, L · 2 · H · D]``, layer i's key at ``2i`` and its value at ``2i + 1``, and lays them into the
cache. They thereby take up positions 0 to P - 1, and the tokens stand P positions further back than without a prefix. Ours take
up none. Rotated keys are turned back by P once, which gives the same scores; where positions are learned vectors, the tokens
are moved (``PrefixConfig.position_offset``).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftkit.errors import ContractError, count, listing
from peftkit.find.modules import base_modules
from peftkit.interop.files import Checkpoint
from peftkit.interop.rotary import check_turning, rotations, turn
from peftkit.prefix import PrefixConfig
from peftkit.prefix.inject import fill_attentions, head_sizes
from peftkit.prefix.module import CHILD
from peftkit.prefix.positions import learned_positions
from peftkit.wrapping import wrap

if TYPE_CHECKING:
    from peft import PeftModel


def import_prefix(model: Any, checkpoint: Checkpoint, adapter_name: str) -> PeftModel:
    """Put a prefix of PEFT's on a model; ``import_adapter`` has the contract."""
    _refuse_encoder_decoder(model)
    flat = _embeddings(checkpoint)
    config = PrefixConfig(
        num_virtual_tokens=flat.shape[0], task_type=checkpoint.config.get("task_type")
    )
    fill_attentions(model, config)
    attentions = list(config.target_modules or ())
    modules: dict[str, Any] = dict(base_modules(model))
    pairs = _pairs(checkpoint, flat, [modules[name] for name in attentions])
    prefixes = dict(zip(attentions, pairs, strict=True))

    angles = rotations(model, attentions, flat.shape[0])
    if angles is not None:
        check_turning(model, attentions, angles, by=flat.shape[0])
        prefixes = {
            name: (turn(modules[name], key, angles[name], back=True), value)
            for name, (key, value) in prefixes.items()
        }
    elif learned_positions(model):
        config.position_offset = flat.shape[0]
    else:
        raise ContractError(
            f"{type(model).__name__} neither turns its keys by position nor has a table of positions known here, so tokens cannot "
            f"be put where {checkpoint.folder} was trained; train a prefix by peftkit.PrefixConfig"
        )
    _say_where_windows_end(model, flat.shape[0])
    imported = wrap(model, config, adapter_name=adapter_name)
    for name, (key, value) in prefixes.items():
        prefix = modules[name]._modules[CHILD].adapters[adapter_name]
        with torch.no_grad():
            prefix.key.copy_(key)
            prefix.value.copy_(value)
    return imported


def _refuse_encoder_decoder(model: Any) -> None:
    if not getattr(model.config, "is_encoder_decoder", False):
        return
    biased = any(hasattr(module, "relative_attention_bias") for module in model.modules())
    why = (
        "its attention adds a bias by relative position to the prefix too, which a prefix without a position does not get"
        if biased
        else "PEFT lays one prefix into the decoder's cache alone and moves the positions of the decoder alone"
    )
    raise ContractError(
        f"prefixes of PEFT for {type(model).__name__} cannot be computed exactly: {why}; train one by peftkit.PrefixConfig"
    )


def _say_where_windows_end(model: Any, count: int) -> None:
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"]
    if window and getattr(text, "use_sliding_window", True) and "sliding_attention" in kinds:
        warnings.warn(
            f"{type(model).__name__} attends to a window of {window} tokens, out of which PEFT's prefix falls; ours stays visible, so "
            f"the two agree on the first {window - count} tokens",
            stacklevel=4,
        )


def _embeddings(checkpoint: Checkpoint) -> Tensor:
    """``[P, L · 2 · H · D]``: as PEFT saves it, or computed from the parts of an encoder that was saved as it trains."""
    tensors = dict(checkpoint.tensors)
    flat = tensors.pop("prompt_embeddings", None)
    if flat is None:
        flat = _encoded(checkpoint, tensors)
    if tensors:
        raise ContractError(
            f"{checkpoint.weights} has {count(len(tensors), 'key')} that no prefix has:\n{listing(list(tensors))}\n"
            "A model's head is loaded together with the base model."
        )
    if flat.ndim != 2:
        raise ContractError(
            f"{checkpoint.weights}: prompt_embeddings is {list(flat.shape)}, not [tokens, layers · 2 · heads · size]"
        )
    return flat.double()


def _encoded(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> Tensor:
    """``W₂ tanh(W₁ e + b₁) + b₂`` with the parts found by the ends of their names, which are taken out of ``tensors``."""

    def take(end: str) -> Tensor | None:
        found = [key for key in tensors if key == end or key.endswith(f".{end}")]
        return tensors.pop(found[0]).double() if len(found) == 1 else None

    embedding = take("embedding.weight")
    if embedding is None:
        raise ContractError(
            f"{checkpoint.weights} has no prompt_embeddings, but {', '.join(sorted(tensors)[:5])}; it is no prefix of PEFT"
        )
    names = ("transform.0.weight", "transform.0.bias", "transform.2.weight", "transform.2.bias")
    transform = [take(name) for name in names]
    if all(part is None for part in transform):
        return embedding
    missing = [name for name, part in zip(names, transform, strict=True) if part is None]
    if missing:
        raise ContractError(f"{checkpoint.weights} has no {missing[0]}; save the adapter again")
    w1, b1, w2, b2 = transform
    hidden = torch.tanh(nn.functional.linear(embedding, w1, b1))  # type: ignore[arg-type]
    return nn.functional.linear(hidden, w2, b2)  # type: ignore[arg-type]


def _pairs(
    checkpoint: Checkpoint, flat: Tensor, attentions: list[nn.Module]
) -> list[tuple[Tensor, Tensor]]:
    """Key and value ``[H_kv, P, D]`` of each attention."""
    sizes = {head_sizes(module) for module in attentions}
    count = checkpoint.config.get("num_virtual_tokens", flat.shape[0])
    kv_heads, _, size, value_size = next(iter(sizes))
    wanted = [count, len(attentions) * 2 * kv_heads * size]
    if len(sizes) > 1 or size != value_size:
        raise ContractError(
            "the attentions of this model have heads of different sizes, of which PEFT skips some; train a prefix by "
            "peftkit.PrefixConfig"
        )
    if list(flat.shape) != wanted:
        trained_on = checkpoint.config.get("base_model_name_or_path") or "a model without a name"
        raise ContractError(
            f"{checkpoint.weights}: prompt_embeddings is {list(flat.shape)}, and this model needs {wanted} ({count} tokens, "
            f"{len(attentions)} layers, {kv_heads} heads of {size}); it was trained on {trained_on!r}"
        )
    table = flat.view(count, len(attentions), 2, kv_heads, size).permute(1, 2, 3, 0, 4)
    return [(key, value) for key, value in table]
