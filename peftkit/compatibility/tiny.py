"""Build a tiny model of any architecture in transformers: its config with all sizes reduced."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import nn

from peftkit.compatibility.batches import training_batch
from peftkit.compatibility.cells import Case

_SMALL = {
    r"hidden_size|d_model|n_embd|dim|embedding_size|word_embed_proj_dim|embed_dim": 32,
    r"num_hidden_layers|n_layers?|num_layers|(encoder|decoder|num_decoder)_layers": 2,
    r"num_attention_heads|n_heads?|num_heads|(encoder|decoder)_attention_heads": 4,
    r"num_key_value_heads": 2,
    r"(qk_(rope|nope)_|v_)?head_dim|d_kv|query_pre_attn_scalar|(kv|q)_lora_rank": 8,
    r"rotary_dim": 4,
    r"qk_head_dim": 16,
    r"intermediate_size|ffn_dim|d_ff|n_inner|hidden_dim|(encoder|decoder)_ffn_dim": 48,
    r"moe_intermediate_size|(shared_)?(expert|experts)_intermediate_size": 24,
    r"num_(local_)?experts|n_routed_experts": 4,
    r"num_experts_per_tok|n_group": 2,
    r"topk_group": 1,
    r"vocab_size": 96,
    r"max_position_embeddings|n_positions|max_target_positions": 64,
    r"max_source_positions|image_size|projection_dim|num_conv_pos_embeddings": 16,
    r"patch_size|sliding_window|num_mel_bins": 8,
    r"(attn|expert)_layer_period": 2,
    r"(attn|expert)_layer_offset": 1,
}
_RANDOM = re.compile(r".*(dropout|drop_?(path|connect|rate)|layer_?drop|_pdrop|stochastic_depth).*")
_STAGES = ("depths", "num_block_repeats", "num_stages")
_WHOLE_IMAGE = ("window_size", "attention_ratio")
"""Settings of models whose tables of positions need the size of their images: Swin, LeViT."""
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_HEADS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
)


def family_case(name_or_config: str) -> Case:
    """Make the ``Case`` of an architecture, for ``run_cells``.

    Args:
        name_or_config: The argument of ``tiny_model``.

    Raises:
        ValueError: The architecture is unknown, a tiny model of it cannot be built, or it computes no loss, so that every cell would fail
            because of the model alone.
    """
    model: Any = tiny_model(name_or_config)
    try:
        with torch.no_grad():
            model.train()(**training_batch(model))
    except Exception as error:  # an unknown architecture can fail in any way with small sizes
        raise ValueError(
            f"a tiny {type(model).__name__} without adapters cannot compute a loss ({shorten(f'{type(error).__name__}: {error}', 300)}), so it "
            "says nothing about adapters; pass a folder whose config.json has small sizes that fit together"
        ) from error
    return Case(name_or_config, lambda: tiny_model(name_or_config))


def tiny_model(name_or_config: str) -> nn.Module:
    """Build a tiny model with seeded random weights, in evaluation mode, without dropout or other randomness in training mode.

    Args:
        name_or_config: A model type of transformers (``"qwen2"``), a folder or file with a ``config.json``, or the id of a
            model on the hub. Only the config is read. Sizes are never increased.

    Raises:
        ValueError: The architecture is unknown, or a tiny model of it cannot be built.
    """
    config = _config(name_or_config)
    shrink(config)
    cls = _class(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = cls(config)
        except Exception as error:  # an unknown architecture can fail in any way with small sizes
            raise ValueError(
                f"a tiny {cls.__name__} cannot be built ({type(error).__name__}: {error}); pass a folder whose config.json has "
                "small sizes that fit together"
            ) from error
        with torch.no_grad():
            for parameter in model.parameters():
                # weights of size 0.02 and norm weights of exactly one would hide wrong factors
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def shrink(config: Any) -> None:
    """Reduce every size in a config and switch off all randomness, in place. Nested configs are changed in the same way."""
    if any(hasattr(config, name) for name in _STAGES):
        _shrink_stages(config)
        without_randomness(config)
        return
    layers = getattr(config, "num_hidden_layers", 0)
    grouped = _value(config, "num_key_value_heads") != _value(config, "num_attention_heads")
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shrink(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            small = next((n for key, n in _SMALL.items() if re.fullmatch(key, name)), value)
            if name == "num_key_value_heads" and not grouped:
                small = 4
            setattr(config, name, min(value, small))
    _shorten(config, layers)
    without_randomness(config)
    for index, name in enumerate(_TOKENS):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, index)
    if getattr(config, "is_encoder_decoder", False):
        config.decoder_start_token_id = 1  # configs no longer have it by default


def _value(config: Any, name: str) -> Any:
    """An attribute of a config; ``None`` if there is none, or another one in each layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def _shorten(config: Any, layers: int) -> None:
    """Keep one layer of each kind, and two at least, in all lists that have an item for each of ``layers`` layers."""
    lists = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == layers > 2
    }
    if not lists:
        return
    kinds = [repr(kind) for kind in zip(*lists.values(), strict=True)]
    first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
    kept = sorted({0, *first.values()})
    kept = kept if len(kept) > 1 else [0, 1]
    for name, value in lists.items():
        setattr(config, name, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)


def _shrink_stages(config: Any) -> None:
    """Reduce the blocks and the images of a model with stages. Its widths depend on each other in ways that differ between models."""
    if isinstance(getattr(config, "depths", None), (list, tuple)):
        config.depths = [min(depth, 2) for depth in config.depths]
    size = getattr(config, "image_size", None)
    if isinstance(size, int) and not any(hasattr(config, name) for name in _WHOLE_IMAGE):
        config.image_size = min(size, 64)


def without_randomness(config: Any) -> None:
    """Set every dropout of a config to zero, in place."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            without_randomness(value)
        elif _RANDOM.fullmatch(name) and isinstance(value, float):
            setattr(config, name, 0.0)
    if hasattr(config, "mask_time_prob"):  # some models that mask have no such switch by default
        config.apply_spec_augment = False


def _config(name_or_config: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if name_or_config in CONFIG_MAPPING:
        return AutoConfig.for_model(name_or_config)
    path = Path(name_or_config)
    try:
        return AutoConfig.from_pretrained(path if path.exists() else name_or_config)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{name_or_config!r} is not a model type of transformers, a folder with a config.json, or a model on the hub "
            f"({' '.join(str(error).split())[:200]}); check the spelling"
        ) from error


def _class(config: Any) -> Any:
    """Return the class that the config names, or transformers' first class with a head for this model type."""
    import transformers
    from transformers.models.auto import modeling_auto

    named = getattr(config, "architectures", None) or []
    for mapping in _HEADS:
        names = getattr(modeling_auto, mapping).get(config.model_type)
        named += [names] if isinstance(names, str) else list(names or [])
    chosen = next((cls for name in named if (cls := getattr(transformers, name, None))), None)
    if chosen is None:
        raise ValueError(
            f"transformers has no class with a head for {config.model_type!r}, so no loss can be computed; use an architecture "
            "with a class for language modelling, classification or CTC"
        )
    return chosen
