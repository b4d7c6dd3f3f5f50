"""What vLLM does with an adapter, as its source code says."""

from __future__ import annotations

import re

from peftkit.serving.rows import (
    MERGE,
    NAMES,
    PER_EXPERT,
    RETRAIN,
    STACKED,
    TOWER,
    Adapter,
    FieldRule,
    Key,
    Row,
    Server,
    is_saved_embedding,
    saved_embedding_row,
)

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM allows for ``--max-lora-rank``. An adapter's rank can be any number up to this value."""
DEFAULT_RANK = 16

_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga")
_INIT_WAY_OUT = "save it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), which turns it into a plain LoRA, or merge it"

SERVER = Server(
    "vLLM",
    "0.33.0 (commit 4ba787ec9)",
    "vllm/lora/{peft_helper,lora_model,model_manager,utils}.py, vllm/config/lora.py, vllm/model_executor/models/",
    (
        FieldRule("use_dora", (False, None), "refused", "does not yet support DoRA", MERGE),
        FieldRule("bias", ("none", None), "refused", "does not support trained biases", MERGE),
        FieldRule(
            "lora_bias", (False, None), "refused", "does not support biases in LoRA layers", MERGE
        ),
        FieldRule(
            "init_lora_weights",
            _PLAIN_INITS,
            "refused",
            "refuses inits that change the base model's weights",
            _INIT_WAY_OUT,
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
            "refused",
            "does not support activated LoRA (aLoRA)",
            RETRAIN,
        ),
        FieldRule(
            "use_bdlora", (None, False), "refused", "does not support block-diagonal LoRA", MERGE
        ),
        FieldRule("use_qalora", (False, None), "refused", "does not support QA-LoRA", MERGE),
        FieldRule(
            "arrow_config", (None,), "wrong", "does not route between adapters (Arrow)", RETRAIN
        ),
        FieldRule("kasa_config", (None,), "wrong", "does not read KaSA's fields", MERGE),
        FieldRule(
            "monteclora_config", (None,), "wrong", "does not read MonteCLoRA's fields", MERGE
        ),
    ),
)

EMBEDDINGS = {
    "embed_tokens": frozenset(
        "Apertus Cohere Cohere2 DeciLM Ernie4_5 Exaone4 FalconH1 Granite GraniteMoe GraniteMoeHybrid GraniteMoeShared "
        "HyperCLOVAX InternLM3 Jamba Lfm2 Lfm2Moe Llama Llama4 MiniCPM MiniCPM3 Mixtral Nemotron NemotronH Phi3 PhiMoE Qwen3 "
        "Qwen3Moe Qwen3_5 Qwen3_5Moe Solar TeleChat3 Arcee Cwm FlexOlmo Glm GPTBigCode GPTNeoX HunYuanDenseV1 HunYuanMoEV1 "
        "Jais2 Olmo Olmo2 Olmo3 Phi SeedOss SmolLM3 Starcoder2 VaultGemma".split()
    ),
    "wte": frozenset(["Exaone"]),
    "lm_head": frozenset(
        "Apertus DeciLM Ernie4_5 Exaone Exaone4 FalconH1 Granite GraniteMoe GraniteMoeHybrid GraniteMoeShared HyperCLOVAX "
        "InternLM3 Jamba Lfm2 Lfm2Moe Llama Llama4 MiniCPM MiniCPM3 Mixtral Nemotron NemotronH Phi3 PhiMoE Qwen3 Qwen3Moe "
        "Qwen3_5 Qwen3_5Moe Solar TeleChat3".split()
    ),
}
"""The ``*ForCausalLM`` classes of vLLM, without this ending, whose ``embedding_modules`` name an embedding."""

NO_LORA = frozenset(
    "BloomForCausalLM Cohere2MoeForCausalLM DbrxForCausalLM DeepseekV32ForCausalLM DeepseekV4ForCausalLM FalconForCausalLM "
    "FalconMambaForCausalLM GPTJForCausalLM Gemma3nForCausalLM KimiLinearForCausalLM MambaForCausalLM Mamba2ForCausalLM "
    "MiMoV2FlashForCausalLM OrionForCausalLM StableLmForCausalLM Zamba2ForCausalLM".split()
)
"""Classes of vLLM that are not ``SupportsLoRA``."""

STACKED_EXPERTS = frozenset(
    "GptOssForCausalLM InternS1ProForConditionalGeneration Qwen3OmniMoeForConditionalGeneration "
    "Qwen3VLMoeForConditionalGeneration Qwen3_5MoeForConditionalGeneration".split()
)
"""Classes with ``is_3d_moe_weight``, which read PEFT's stacked experts. All others read one pair for each expert."""

_FORMAT_FLAG = "or start vLLM with --enable-mixed-moe-lora-format and set is_3d_lora_weight=True on the LoRARequest"


def config_rows(adapter: Adapter) -> list[Row]:
    """Rows for fields whose rule needs more than a list of harmless values."""
    rows = []
    other = [
        name
        for name in adapter.config.get("modules_to_save") or ()
        if name not in ("classifier", "score")
    ]
    if other:
        rows.append(
            Row(
                "modules_to_save",
                "refused",
                f"vLLM reads only the heads classifier and score, not {', '.join(other)}",
                MERGE,
            )
        )
    unsupported = adapter.base and NO_LORA.intersection(adapter.base.architectures)
    if unsupported:
        rows.append(
            Row(
                "base_model_name_or_path",
                "refused",
                f"vLLM has no LoRA for {', '.join(sorted(unsupported))}",
                MERGE,
            )
        )
    return rows


def tensor_row(key: Key, adapter: Adapter) -> Row:
    """What vLLM does with one tensor."""
    if is_saved_embedding(key):
        return saved_embedding_row(key, adapter, "vLLM")
    if not key.role and re.search(r"\.(score|classifier)\.(weight|bias)$", key.name):
        return Row(key.name, "loads")
    if not key.as_peft_writes:
        way_out = NAMES if key.has_adapter_name else MERGE
        return Row(key.name, "refused", "vLLM raises an error for this name", way_out)
    if len(adapter.shapes[key.name]) > 2:
        return Row(
            key.name, "refused", "it belongs to a convolution; vLLM adapts linear layers", MERGE
        )
    if key.is_stack:
        return _stacked_experts(key, adapter)
    if key.is_one_expert:
        return _one_expert(key, adapter)
    if key.leaf in ("embed_tokens", "wte", "lm_head"):
        return _embedding(key, adapter)
    return _linear(key, adapter)


def _stacked_experts(key: Key, adapter: Adapter) -> Row:
    if adapter.base is None:
        why = "it depends on the base model whether vLLM reads stacked experts"
        return Row(key.name, "unknown", why, "pass the base model (--base)")
    if not STACKED_EXPERTS.intersection(adapter.base.architectures):
        why = f"vLLM reads one pair for each expert of {_named(adapter)}"
        return Row(key.name, "refused", why, f"{PER_EXPERT}, {_FORMAT_FLAG}")
    container = key.module.removesuffix(".base_layer")
    modules = {other.module for other in adapter.keys}
    if not {container, f"{container}.base_layer"} <= modules:
        why = "vLLM reads gate_up_proj and down_proj only together"
        return Row(key.name, "refused", why, MERGE)
    if _is_transposed(container, adapter):
        why = "its factors are those of the transposed weights, as PEFT before 0.19 wrote them"
        return Row(
            key.name, "refused", why, "load it with a newer PEFT and train again, or " + MERGE
        )
    return Row(key.name, "loads")


def _is_transposed(container: str, adapter: Adapter) -> bool:
    """Whether the inputs of the factors are the outputs of the experts' weights."""

    def size(module: str, role: str, axis: int) -> int:
        name = f"{module}.{role}.weight"
        found = [s for key, s in adapter.shapes.items() if key.endswith(name) and len(s) == 2]
        return found[0][axis] if found else 0

    gate_in, gate_out = (
        size(f"{container}.base_layer", "lora_A", 1),
        size(f"{container}.base_layer", "lora_B", 0),
    )
    down_in, down_out = size(container, "lora_A", 1), size(container, "lora_B", 0)
    return gate_out != 2 * down_in and gate_in == 2 * down_out


def _one_expert(key: Key, adapter: Adapter) -> Row:
    if adapter.base is not None and STACKED_EXPERTS.intersection(adapter.base.architectures):
        why = f"vLLM reads stacked experts of {_named(adapter)}"
        return Row(
            key.name,
            "refused",
            why,
            f"{STACKED}, or start vLLM with --enable-mixed-moe-lora-format",
        )
    return Row(key.name, "loads")


def _embedding(key: Key, adapter: Adapter) -> Row:
    base = adapter.base
    if base is None:
        why = "vLLM adapts embeddings only of some models"
        return Row(key.name, "unknown", why, "pass the base model (--base)")
    supported = {f"{stem}ForCausalLM" for stem in EMBEDDINGS[key.leaf]}
    if not supported.intersection(base.architectures):
        why = f"vLLM does not adapt {key.leaf} of {_named(adapter)}"
        return Row(key.name, "refused", why, MERGE)
    shape = adapter.shapes[key.name]
    if key.role == "lora_embedding_A" and base.vocab_size not in (None, shape[1]):
        why = f"it has {shape[1]} columns, but the vocabulary has {base.vocab_size} tokens"
        return Row(key.name, "refused", why, MERGE)
    return _linear(key, adapter)


def _linear(key: Key, adapter: Adapter) -> Row:
    """The row of a linear layer: vLLM ignores pairs whose module it does not have, without an error."""
    base = adapter.base
    if TOWER.search(key.module):
        why = "vLLM adapts only the language model by default"
        return Row(
            key.name,
            "ignored",
            why,
            "start vLLM with --enable-tower-connector-lora, which some models support",
        )
    if key.is_wrapped:
        why = "vLLM has no module of this name: a wrapper around the model added to it"
        return Row(key.name, "ignored", why, NAMES)
    if base is None:
        pooling = adapter.config.get("task_type") in ("FEATURE_EXTRACTION", "SEQ_CLS", "TOKEN_CLS")
        if key.module.startswith("layers.") and not pooling:
            why = "its name lacks 'model.': the adapter was trained on a model without a head, and vLLM finds no such module"
            return Row(
                key.name,
                "ignored",
                why,
                "train it on the model with its head (AutoModelForCausalLM)",
            )
        return Row(key.name, "loads")
    if key.module in base.modules or key.module == "lm_head":
        return Row(key.name, "loads")
    if key.module.replace("model.", "model.language_model.", 1) in base.modules:
        return Row(key.name, "loads")  # trained on the language model of a multimodal model alone
    why = f"{_named(adapter)} has no module {key.module}"
    return Row(key.name, "ignored", why, _rename(key, base.modules))


def _rename(key: Key, modules: frozenset[str]) -> str:
    ends = [
        name
        for name in modules
        if name.endswith(f".{key.module}") or key.module.endswith(f".{name}")
    ]
    longest = max(ends, key=len, default=None)
    if longest is None or "." not in longest:
        return "serve it with the model that it was trained on"
    return f"rename the keys: this module is called {longest} there"


def _named(adapter: Adapter) -> str:
    assert adapter.base is not None
    return ", ".join(adapter.base.architectures) or adapter.base.model_type
