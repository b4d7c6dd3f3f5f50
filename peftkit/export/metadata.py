"""The hyperparameters of a model as GGUF metadata, and back."""

from __future__ import annotations

from typing import Any

from peftkit.export.families import Family, head_dim, require_gguf, rope_of, window_of
from peftkit.export.tensors import DType


def add_model_metadata(
    writer: Any, family: Family, config: Any, name: str, dtype: DType
) -> list[str]:
    """Write a model's hyperparameters.

    Args:
        writer: A ``gguf.GGUFWriter``.
        family: The model's family.
        config: The model's config.
        name: Name of the model.
        dtype: How matrices are stored.

    Returns:
        Notes for the user.
    """
    gguf = require_gguf()
    notes = []
    writer.add_type("model")
    writer.add_name(name)
    kinds = gguf.LlamaFileType
    writer.add_file_type(kinds.ALL_F32 if dtype == "f32" else kinds[f"MOSTLY_{dtype.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    context = config.max_position_embeddings
    window = window_of(config)
    if window is not None:
        notes.append(
            f"the model attends to the last {window} tokens only, which llama.cpp does not do for {family.arch}: the file's context "
            f"length is {window} instead of {context}"
        )
        context = window
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim(config))
    _add_rope(writer, config)
    return notes


def _add_rope(writer: Any, config: Any) -> None:
    gguf = require_gguf()
    rope = rope_of(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind not in ("linear", "yarn"):
        return  # the divisors of llama3 are a tensor
    writer.add_rope_scaling_type(gguf.RopeScalingType[kind.upper()])
    writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )
        for field, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(field) is not None:
                add(rope[field])


def completed_config(config: Any, fields: dict[str, Any], tensors: set[str]) -> Any:
    """Set the fields that transformers does not read from a GGUF file, from the file's metadata and tensors.

    Args:
        config: What transformers read.
        fields: The file's metadata.
        tensors: The names of the file's tensors.
    """
    arch = fields["general.architecture"]
    config.head_dim = fields[f"{arch}.attention.key_length"]
    rope = rope_of(config) | {"rope_theta": fields[f"{arch}.rope.freq_base"]}
    scaling = f"{arch}.rope.scaling"
    if f"{scaling}.type" in fields:
        rope["rope_type"] = fields[f"{scaling}.type"]
        for ours, theirs in (
            ("factor", "factor"),
            ("original_max_position_embeddings", "original_context_length"),
            ("attention_factor", "yarn_attn_factor"),
            ("beta_fast", "yarn_beta_fast"),
            ("beta_slow", "yarn_beta_slow"),
        ):
            if f"{scaling}.{theirs}" in fields:
                rope[ours] = fields[f"{scaling}.{theirs}"]
    config.rope_parameters = rope
    if hasattr(config, "attention_bias"):
        config.attention_bias = "blk.0.attn_q.bias" in tensors
    if hasattr(config, "mlp_bias"):
        config.mlp_bias = "blk.0.ffn_gate.bias" in tensors
    return config
