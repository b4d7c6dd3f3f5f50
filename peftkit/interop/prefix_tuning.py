"""Import PEFT's prefix tuning as a ``PrefixConfig`` adapter.

PEFT saves ``prompt_embeddings [P, L · 2 · H · D]``: the key of layer i is at ``2i``, the value at ``2i + 1``. PEFT puts them in
the cache, so the prefix takes positions 0 to P - 1 and the tokens start at position P. peftkit's prefix takes no positions, so
the tokens start at 0. If the model rotates its keys (RoPE), the prefix's keys are rotated back by P positions once, which gives
the same scores. If positions are learned vectors, P is added to the tokens' positions (``PrefixConfig.position_offset``).
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
    """Add a prefix saved by PEFT to a model. See ``import_adapter`` for the arguments and errors."""
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
            f"{type(model).__name__} neither rotates its keys by position nor has a known table of learned positions, so the "
            f"token positions of {checkpoint.folder} cannot be reproduced; train a prefix with peftkit.PrefixConfig"
        )
    _warn_about_window(model, flat.shape[0])
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
        "with PEFT its attention adds a relative position bias to the prefix, but a prefix of peftkit has no position"
        if biased
        else "PEFT puts a prefix in the decoder's cache only and shifts only the positions of the decoder"
    )
    raise ContractError(
        f"PEFT's prefixes for {type(model).__name__} cannot be computed exactly: {why}; train a prefix with "
        "peftkit.PrefixConfig"
    )


def _warn_about_window(model: Any, count: int) -> None:
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"]
    if window and getattr(text, "use_sliding_window", True) and "sliding_attention" in kinds:
        warnings.warn(
            f"{type(model).__name__} attends to a sliding window of {window} tokens. PEFT's prefix leaves this window in long "
            f"texts, but peftkit's prefix stays visible: the outputs agree only on the first {window - count} tokens",
            stacklevel=4,
        )


def _embeddings(checkpoint: Checkpoint) -> Tensor:
    """Return the prompt embeddings ``Float64[P, L · 2 · H · D]``.

    PEFT saves either the embeddings or the parts of the encoder that computes them.
    """
    tensors = dict(checkpoint.tensors)
    flat = tensors.pop("prompt_embeddings", None)
    if flat is None:
        flat = _encoded(checkpoint, tensors)
    if tensors:
        raise ContractError(
            f"{checkpoint.weights} has {count(len(tensors), 'key')} outside the prefix:\n{listing(list(tensors))}\n"
            "If these are a model's head, load the head with the base model and remove these keys."
        )
    if flat.ndim != 2:
        raise ContractError(
            f"{checkpoint.weights}: prompt_embeddings has the shape {list(flat.shape)} instead of "
            "[tokens, layers · 2 · heads · size]; save the adapter again"
        )
    return flat.double()


def _encoded(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> Tensor:
    """Compute ``W₂ tanh(W₁ e + b₁) + b₂`` from the encoder's parts, and remove these parts from ``tensors``.

    The parts are found by the ends of their names.
    """

    def take(end: str) -> Tensor | None:
        found = [key for key in tensors if key == end or key.endswith(f".{end}")]
        return tensors.pop(found[0]).double() if len(found) == 1 else None

    embedding = take("embedding.weight")
    if embedding is None:
        raise ContractError(
            f"{checkpoint.weights} is not a prefix saved by PEFT: it has no prompt_embeddings, but "
            f"{', '.join(sorted(tensors)[:5])}; pass the folder of a prefix tuning adapter"
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
    """Return the key and value of each attention, each ``[H_kv, P, D]``."""
    sizes = {head_sizes(module) for module in attentions}
    count = checkpoint.config.get("num_virtual_tokens", flat.shape[0])
    kv_heads, _, size, value_size = next(iter(sizes))
    wanted = [count, len(attentions) * 2 * kv_heads * size]
    if len(sizes) > 1 or size != value_size:
        raise ContractError(
            "the attentions of this model have heads of different sizes, and PEFT skips some of these attentions; train a "
            "prefix with peftkit.PrefixConfig"
        )
    if list(flat.shape) != wanted:
        trained_on = checkpoint.config.get("base_model_name_or_path") or "a model without a name"
        raise ContractError(
            f"{checkpoint.weights}: prompt_embeddings has the shape {list(flat.shape)}, but this model needs {wanted} ({count} "
            f"tokens, {len(attentions)} layers, {kv_heads} heads of size {size}); load the model that it was trained on: "
            f"{trained_on!r}"
        )
    table = flat.view(count, len(attentions), 2, kv_heads, size).permute(1, 2, 3, 0, 4)
    return [(key, value) for key, value in table]
