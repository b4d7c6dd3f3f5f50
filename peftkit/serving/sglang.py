"""What SGLang does with an adapter, as its source code says."""

from __future__ import annotations

import math
import re

from peftkit.serving.rows import (
    MERGE,
    PER_EXPERT,
    RETRAIN,
    UNIFORM,
    Adapter,
    FieldRule,
    Key,
    Row,
    Server,
    is_saved_embedding,
    module_scale,
    saved_embedding_row,
)

SERVER = Server(
    "SGLang",
    "0.5.23",
    "python/sglang/srt/lora/{lora_config,lora,lora_manager,mem_pool,utils}.py",
    (
        FieldRule("use_dora", (False, None), "refused", "does not support DoRA", MERGE),
        FieldRule("bias", ("none", None), "refused", "reads trained biases as factors", MERGE),
        FieldRule(
            "lora_bias", (False, None), "refused", "reads biases of LoRA layers as factors", MERGE
        ),
        FieldRule(
            "init_lora_weights",
            (True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga"),
            "wrong",
            "does not change the base model's weights as this init does",
            "save it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), or merge it",
        ),
        FieldRule(
            "layer_replication",
            (None, []),
            "refused",
            "does not repeat layers of the base model",
            MERGE,
        ),
        FieldRule(
            "alora_invocation_tokens",
            (None, []),
            "wrong",
            "applies the adapter to all tokens (it does not read aLoRA's fields)",
            RETRAIN,
        ),
        FieldRule("use_bdlora", (None, False), "wrong", "does not read BD-LoRA's fields", MERGE),
        FieldRule("use_qalora", (False, None), "refused", "does not pool inputs (QA-LoRA)", MERGE),
        FieldRule(
            "arrow_config", (None,), "wrong", "does not route between adapters (Arrow)", RETRAIN
        ),
        FieldRule("kasa_config", (None,), "wrong", "does not read KaSA's fields", MERGE),
        FieldRule(
            "monteclora_config", (None,), "wrong", "does not read MonteCLoRA's fields", MERGE
        ),
    ),
)

BUFFER_OF = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "unembed_tokens": "lm_head",
    "q_a_proj": "fused_qkv_a_proj_with_mqa",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj_with_mqa",
}
"""The stacked buffer that holds a module's factors, if it has another name."""
BUFFERS = frozenset(
    "qkv_proj o_proj out_proj in_proj in_proj_qkvz up_proj gate_up_proj down_proj fc1_latent_proj fc2_latent_proj embed_tokens "
    "lm_head fused_qkv_a_proj_with_mqa q_b_proj kv_b_proj".split()
)
"""The modules for which SGLang has buffers, whatever the model. Some models define more."""
_EXPERT_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_LAYER = re.compile(r"layers\.\d+\.")


def config_rows(adapter: Adapter) -> list[Row]:
    """Rows for fields whose rule needs more than a list of harmless values."""
    config = adapter.config
    rows = []
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        why = "SGLang reads lists of names here, not patterns"
        rows.append(Row("target_modules", "refused", why, UNIFORM))
    if adapter.is_peft_lora:
        rows += _scales(adapter)
    for name in config.get("modules_to_save") or ():
        why = f"SGLang skips the trained weights of {name}, without an error"
        rows.append(Row("modules_to_save", "ignored", why, MERGE))
    base = adapter.base
    if adapter.added_tokens is not None and (
        base is None or base.vocab_size is None or adapter.added_tokens >= base.vocab_size
    ):
        if base is None:
            why = "added_tokens.json is in the folder; SGLang refuses adapters that add tokens to the vocabulary"
            rows.append(Row("added_tokens.json", "unknown", why, "pass the base model (--base)"))
        else:
            why = "SGLang refuses adapters that add tokens to the vocabulary"
            rows.append(Row("added_tokens.json", "refused", why, MERGE))
    return rows


def _scales(adapter: Adapter) -> list[Row]:
    """SGLang has one rank and one scale for all modules: ``r`` and ``lora_alpha / r``."""
    config = adapter.config
    ranks = adapter.ranks()
    odd = sorted({rank for rank in ranks.values() if rank != config["r"]})
    if odd:
        why = f"SGLang expects rank {config['r']} everywhere, but there are modules of rank {', '.join(map(str, odd))}"
        return [Row("rank_pattern", "refused", why, UNIFORM)]
    expected = config["lora_alpha"] / config["r"]
    wrong = [name for name in ranks if not math.isclose(module_scale(config, name), expected)]
    if not wrong:
        return []
    field = "use_rslora" if config.get("use_rslora") else "alpha_pattern"
    why = (
        f"SGLang multiplies by lora_alpha / r = {expected:g}, but {len(wrong)} of {len(ranks)} modules were trained with "
        f"another scale, such as {module_scale(config, wrong[0]):g} ({wrong[0]})"
    )
    return [Row(field, "wrong", why, UNIFORM)]


def tensor_row(key: Key, adapter: Adapter) -> Row:
    """What SGLang does with one tensor. It looks for parts of names, so prefixes do not matter."""
    if is_saved_embedding(key):
        return saved_embedding_row(key, adapter, "SGLang")
    layer = _LAYER.search(key.module)
    if not key.role or key.rest == "bias":
        if layer is None:
            return Row(key.name, "ignored", "SGLang skips this tensor, without an error", MERGE)
        return Row(
            key.name, "refused", "SGLang reads it as a factor, whose shape it does not have", MERGE
        )
    if key.is_stack:
        why = "SGLang does not know the names of PEFT's stacked experts and skips them, without an error"
        return Row(key.name, "ignored", why, PER_EXPERT)
    leaf = _EXPERT_NAMES.get(key.leaf, key.leaf) if key.is_one_expert else key.leaf
    if layer is None:
        if leaf not in ("embed_tokens", "lm_head", "unembed_tokens"):
            why = "SGLang skips modules outside numbered layers (layers.0.), without an error"
            return Row(key.name, "ignored", why, MERGE)
        if not _is_targeted(leaf, adapter):
            why = f"SGLang skips it, because target_modules does not name {leaf}"
            return Row(
                key.name, "ignored", why, f"add {leaf!r} to target_modules in adapter_config.json"
            )
    if re.search(r"(vision_tower|vision_model|visual|audio_tower)\.", key.module):
        why = "SGLang would store it as a factor of the language model's layer with the same number"
        return Row(key.name, "wrong", why, MERGE)
    buffer = BUFFER_OF.get(leaf, leaf)
    if buffer not in BUFFERS:
        why = f"SGLang has a buffer for {leaf} only if the model's class defines one"
        return Row(key.name, "unknown", why, f"try it with --lora-strict-loading, or {MERGE}")
    return _with_siblings(key, leaf, adapter)


def _is_targeted(leaf: str, adapter: Adapter) -> bool:
    targets = adapter.config.get("target_modules")
    if isinstance(targets, str):
        return True
    names = {str(name).rpartition(".")[2] for name in targets or ()}
    same = {"lm_head", "unembed_tokens"} if leaf in ("lm_head", "unembed_tokens") else {leaf}
    return bool(names & same)


def _with_siblings(key: Key, leaf: str, adapter: Adapter) -> Row:
    """SGLang stacks q, k and v, and gate and up, and does not do so for every subset of them."""
    parent = key.module.rpartition(".")[0]
    inverse = {new: old for old, new in _EXPERT_NAMES.items()}
    here = {k.module for k in adapter.keys}

    def has(name: str) -> bool:
        return f"{parent}.{name}" in here or f"{parent}.{inverse.get(name)}" in here

    if leaf == "q_proj" and not has("v_proj"):
        return Row(
            key.name,
            "refused",
            "SGLang stacks q_proj with v_proj, which is missing",
            _zeros("v_proj"),
        )
    if leaf in ("k_proj", "v_proj") and not has("q_proj"):
        why = "SGLang reads it only together with q_proj and skips it, without an error"
        return Row(key.name, "ignored", why, _zeros("q_proj"))
    if leaf == "up_proj" and not has("gate_proj"):
        why = "SGLang reads it only together with gate_proj and skips it, without an error"
        return Row(key.name, "ignored", why, _zeros("gate_proj"))
    return Row(key.name, "loads")


def _zeros(name: str) -> str:
    return f"train {name} too, or {MERGE}"
