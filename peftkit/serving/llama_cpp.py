"""What llama.cpp does with an adapter: ``convert_lora_to_gguf.py`` reads it, and ``--lora`` loads the result."""

from __future__ import annotations

import math

from peftkit.serving.rows import (
    MERGE,
    NAMES,
    PER_EXPERT,
    Adapter,
    FieldRule,
    Key,
    Row,
    Server,
    is_saved_embedding,
    module_scale,
    saved_embedding_row,
)

_EXPORT = "write the adapter with peftkit export ADAPTER OUT.gguf --adapter-only, which puts the scale into the factors"
_SCALE_OF_INIT = "save it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), or merge it"

SERVER = Server(
    "llama.cpp",
    "as in llama-cpp-python 0.3.36",
    "convert_lora_to_gguf.py, conversion/, src/llama-adapter.cpp",
    (
        FieldRule("use_dora", (False, None), "refused", "does not support DoRA", MERGE),
        FieldRule("bias", ("none", None), "refused", "does not read trained biases", MERGE),
        FieldRule(
            "lora_bias", (False, None), "refused", "does not read biases of LoRA layers", MERGE
        ),
        FieldRule(
            "init_lora_weights",
            (True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga"),
            "wrong",
            "does not change the base model's weights as this init does",
            _SCALE_OF_INIT,
        ),
        FieldRule(
            "layer_replication",
            (None, []),
            "refused",
            "does not repeat layers of the base model",
            MERGE,
        ),
        FieldRule("use_bdlora", (None, False), "wrong", "does not read BD-LoRA's fields", MERGE),
        FieldRule("use_qalora", (False, None), "refused", "does not pool inputs (QA-LoRA)", MERGE),
        FieldRule("kasa_config", (None,), "wrong", "does not read KaSA's fields", MERGE),
        FieldRule(
            "monteclora_config", (None,), "wrong", "does not read MonteCLoRA's fields", MERGE
        ),
    ),
)


def config_rows(adapter: Adapter) -> list[Row]:
    """Rows for fields whose rule needs more than a list of harmless values."""
    rows = []
    for name in adapter.config.get("modules_to_save") or ():
        why = f"llama.cpp does not read the trained weights of {name}"
        rows.append(Row("modules_to_save", "refused", why, MERGE))
    if adapter.is_peft_lora:
        rows += _scales(adapter)
    return rows


def _scales(adapter: Adapter) -> list[Row]:
    """llama.cpp divides the config's ``lora_alpha`` by the rank of each pair."""
    config = adapter.config
    ranks = adapter.ranks()
    wrong = [
        name
        for name, rank in ranks.items()
        if not math.isclose(module_scale(config, name), config["lora_alpha"] / rank)
    ]
    if not wrong:
        return []
    field = "use_rslora" if config.get("use_rslora") else "alpha_pattern"
    rank = ranks[wrong[0]]
    why = (
        f"llama.cpp multiplies by lora_alpha / rank, but {len(wrong)} of {len(ranks)} modules were trained with another scale, "
        f"such as {module_scale(config, wrong[0]):g} instead of {config['lora_alpha'] / rank:g} ({wrong[0]})"
    )
    return [Row(field, "wrong", why, _EXPORT)]


def tensor_row(key: Key, adapter: Adapter) -> Row:
    """What llama.cpp does with one tensor."""
    if not key.role:
        if is_saved_embedding(key):
            return saved_embedding_row(key, adapter, "llama.cpp")
        if "_layernorm" in key.name or ".norm" in key.name:
            return Row(
                key.name,
                "ignored",
                "llama.cpp skips trained norms when it loads the adapter",
                MERGE,
            )
        return Row(key.name, "refused", "it is not a factor of LoRA", MERGE)
    if not key.as_peft_writes:
        way_out = NAMES if key.has_adapter_name else MERGE
        return Row(key.name, "refused", "the converter raises an error for this name", way_out)
    if key.is_stack:
        why = "the converter does not know the names of PEFT's stacked experts"
        return Row(key.name, "refused", why, PER_EXPERT)
    if key.is_wrapped:
        why = "the converter does not know this name: a wrapper around the model added to it"
        return Row(key.name, "refused", why, NAMES)
    if len(adapter.shapes[key.name]) > 2:
        return Row(key.name, "refused", "it belongs to a convolution", MERGE)
    base = adapter.base
    if key.leaf == "lm_head" and (base is None or base.tied):
        if base is None:
            why = "the converter refuses an adapted lm_head if the embeddings are tied"
            return Row(key.name, "unknown", why, "pass the base model (--base)")
        return Row(
            key.name, "refused", "lm_head is the input embedding in this model's file", MERGE
        )
    if base is not None and not key.is_one_expert and key.module not in base.modules:
        why = f"{', '.join(base.architectures) or base.model_type} has no module {key.module}"
        return Row(key.name, "refused", why, "serve it with the model that it was trained on")
    return Row(key.name, "loads")
