"""The space of cases: what each option may be, and how often it is drawn."""

import random
from typing import Any

from fuzz.build import Case
from fuzz.plain import FAMILIES as PLAIN
from fuzz.plain import FORMULAS
from fuzz.touches import BEFORE, TOUCHES

CAUSAL = (
    "llama",
    "gemma2",
    "gemma3_text",
    "qwen3",
    "phi3",
    "gpt2",
    "opt",
    "granite",
    "cohere",
    "mistral",
)
CAUSAL += (
    "falcon_h1",
    "deepseek_v4",
    "gpt_oss",
    "qwen3_moe",
    "mixtral",
    "olmo2",
    "glm4",
    "phi",
    "gpt_neox",
)
CAUSAL += (
    "bloom",
    "falcon",
    "stablelm",
    "starcoder2",
    "nemotron",
    "smollm3",
    "gemma",
    "cohere2",
    "exaone4",
)
OTHERS = (
    "bert",
    "roberta",
    "distilbert",
    "electra",
    "modernbert",
    "albert",
    "convbert",
    "rembert",
    "deberta-v2",
)
OTHERS += ("t5", "bart", "whisper", "m2m_100", "vit", "segformer", "clip", "dinov2", "siglip")

LARGE = (
    "luke",
    "flaubert",
    "xlm",
    "gemma4",
    "gemma4_text",
    "florence2",
    "bit",
    "cvt",
    "textnet",
    "focalnet",
)
LARGE += (
    "longcat_flash",
    "muse_spark",
    "muse_glimmer",
    "janus",
    "perceiver",
    "blt",
    "hgnet_v2",
    "hiera",
    "wavlm",
)
LARGE += (
    "regnet",
    "resnet",
    "poolformer",
    "vibevoice",
    "vibevoice_asr",
    "minimax_m3_vl",
    "nemotron_h_omni",
)
LARGE += (
    "glm5_next",
    "deepseek_vl_hybrid",
    "mobilevit",
    "swiftformer",
    "inkling2",
    "roc_bert",
    "markuplm",
)
"""Model types that stay large whatever their config says, so that a case takes seconds."""

ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "relu", "silu", "quick_gelu", "gelu_new", "relu2")
_ACT_NAMES = ("hidden_act", "hidden_activation", "activation_function", "hidden_act")

# name, probability, values
_LORA: tuple[tuple[str, float, tuple[Any, ...]], ...] = (
    ("targets", 0.5, ("some", "one", "attention", "head", "embedding", "experts", "all-linear")),
    ("lora.r", 0.3, (1, 2, 8, 17, 64)),
    ("lora.lora_alpha", 0.2, (1, 0.5, 64)),
    ("lora.use_rslora", 0.15, (True,)),
    ("lora.use_dora", 0.2, (True,)),
    ("lora.bias", 0.15, ("all", "lora_only")),
    ("lora.lora_bias", 0.05, (True,)),
    ("lora.init_lora_weights", 0.15, (False, "gaussian", "olora", "pissa", "orthogonal")),
    ("lora.lora_dropout", 0.1, (0.1, 0.5)),
    ("lora.trainable_token_indices", 0.05, ([3, 5],)),
    ("lora.ensure_weight_tying", 0.03, (True,)),
    ("exclude", 0.05, (True,)),
    ("ranks", 0.15, (True,)),
    ("save_head", 0.1, (True,)),
    ("adapter_dtype", 0.25, ("same",)),
    ("front", 0.15, ("accelerate",)),
)
_BATCH: tuple[tuple[str, float, tuple[Any, ...]], ...] = (
    ("rows", 0.2, (1, 3)),
    ("length", 0.5, (1, 2, 3, 17, 33, 70)),
    ("padding", 0.4, ("left", "right")),
    ("ignored", 0.2, ("all", "row", "start")),
    ("labels", 0.15, ("none", "shifted")),
    ("num_items", 0.1, (0, 1, 7, 1000)),
    ("embeds", 0.1, (True,)),
    ("mask", 0.15, ("4d", "none")),
    ("scale", 0.2, (1e-3, 30.0)),
    ("cotangent", 0.2, (2.0**-13, 2.0**-20)),
)
_MODE: tuple[tuple[str, float, tuple[Any, ...]], ...] = (
    ("train", 0.6, (True,)),
    ("grad", 0.15, ("none", "inference")),
    ("autocast", 0.1, ("bfloat16",)),
    ("checkpointing", 0.15, ("reentrant", "non-reentrant")),
    ("adapters", 0.25, ("second", "both", "switched", "deleted", "merged", "unmerged", "unloaded")),
    ("adapters", 0.08, ("removed", "disabled")),
    ("attention", 0.2, ("eager",)),
    ("layers", 0.3, (2,)),
    ("touch", 0.35, tuple(TOUCHES)),
    ("touch_first", 0.08, BEFORE),
    ("copy", 0.15, ("deepcopy", "pickle", "save", "restore")),
    ("steps", 0.1, (1, 2)),
    ("twice", 0.15, (True,)),
    ("threads", 0.04, (True,)),
    ("call", 0.08, ("functional", "trace")),
    (
        "logits",
        0.3,
        ("read", "in the loss", "merged", "data", "retained", "hooked", "differentiated"),
    ),
)
_CONFIG: tuple[tuple[str, float, tuple[Any, ...]], ...] = (
    ("hidden_act", 0.25, ACTIVATIONS),
    ("hidden_activation", 0.15, ACTIVATIONS),
    ("activation_function", 0.1, ACTIVATIONS),
    ("rms_norm_eps", 0.15, (1e-8, 1e-2, 1.0)),
    ("layer_norm_eps", 0.15, (1e-8, 1e-2, 1.0)),
    ("tie_word_embeddings", 0.2, (True, False)),
    ("attention_dropout", 0.08, (0.3,)),
    ("resid_pdrop", 0.05, (0.3,)),
    ("hidden_dropout_prob", 0.05, (0.3,)),
    ("swiglu_limit", 0.3, (0.3, 1.0)),
    ("mlp_multipliers", 0.3, ([0.95, 0.9], [1.004, 1.0])),
    ("final_logit_softcapping", 0.15, (2.0, 30.0)),
    ("attn_logit_softcapping", 0.1, (2.0,)),
    ("logit_scale", 0.2, (0.3,)),
    ("logits_scaling", 0.2, (3.0,)),
    ("residual_multiplier", 0.2, (0.5,)),
    ("head_dim", 0.3, (32,)),
    ("num_key_value_heads", 0.15, (1, 4)),
    ("attention_bias", 0.15, (True,)),
    ("mlp_bias", 0.15, (True,)),
    ("router_aux_loss_coef", 0.1, (0.5,)),
    ("output_router_logits", 0.1, (True,)),
)
_VALUES = ("channels", "peaks", "mean", "large", "small")
_DTYPES = (("float64", 0.5), ("float32", 0.15), ("bfloat16", 0.2), ("float16", 0.15))


def random_case(
    choose: random.Random, seed: int, every: tuple[str, ...], start: Case | None = None
) -> Case:
    """Draw a case.

    Args:
        choose: The source of choices.
        seed: Of weights and batch.
        every: Model types to draw from besides the usual ones.
        start: Options that are given; the others are then drawn a third as often.
    """
    thin = 1.0 if start is None else 0.3
    case: Case = {"family": _family(choose, every)} | (start or {}) | {"seed": seed}
    if "dtype" not in case:
        kinds, weights = zip(*_DTYPES, strict=True)
        case["dtype"] = choose.choices(kinds, weights)[0]
    if case["family"] in FORMULAS and "formula" not in case:
        case["formula"] = choose.choice(FORMULAS[case["family"]])
    drawn = [corner for corner in _VALUES if choose.random() < 0.35 * thin]
    if drawn and "values" not in case:
        case["values"] = drawn
    for table in (_LORA, _BATCH, _MODE):
        _draw(case, table, choose, thin)
    _draw_config(case, choose, thin)
    return consistent(case)


def _family(choose: random.Random, every: tuple[str, ...]) -> str:
    groups = (CAUSAL, OTHERS, PLAIN, every or CAUSAL)
    return choose.choice(choose.choices(groups, (0.45, 0.2, 0.2, 0.15))[0])


def _draw(case: Case, table: Any, choose: random.Random, thin: float) -> None:
    for name, probability, values in table:
        if choose.random() < probability * thin and name not in case:
            case[name] = choose.choice(values)


def _draw_config(case: Case, choose: random.Random, thin: float) -> None:
    """Settings that the config of the family has."""
    known = config_names(case["family"])
    for name, probability, values in _CONFIG:
        wanted = choose.random() < probability * thin
        if wanted and name in known and f"config.{name}" not in case:
            case[f"config.{name}"] = choose.choice(values)


def config_names(family: str) -> set[str]:
    """Names of the settings of an architecture and its parts."""
    from peftkit.compatibility import tiny

    if family in PLAIN:
        return set()
    try:
        config = tiny._config(family)
    except Exception:  # a config that has no default
        return set()
    parts = [v for v in vars(config).values() if hasattr(v, "model_type")]
    return {name for part in (config, *parts) for name in vars(part)}


def consistent(case: Case) -> Case:
    """Leave out options that cannot be had together."""
    drop = set()
    if case.get("threads"):
        case["dtype"] = "float64"
    if case.get("exclude"):
        drop |= {"ranks"}
    if case.get("dtype") == "float64":
        drop |= {"adapter_dtype", "autocast"}
    if case.get("logits") in ("merged", "data", "retained", "hooked", "differentiated"):
        drop |= {"grad", "adapters", "twice", "threads", "checkpointing", "call", "cotangent"}
    if case.get("threads"):
        drop |= {"checkpointing", "call", "steps", "twice", "copy", "touch", "logits", "embeds"}
        drop |= {"touch_first", "adapters", "lora.lora_dropout"}
    if case.get("call", "plain") != "plain":
        drop |= {"checkpointing", "steps", "twice", "grad", "logits", "adapters", "embeds"}
    if case.get("call") == "trace":
        drop |= {"num_items", "labels", "train"}
    if case.get("adapters") in ("merged", "unloaded", "removed", "disabled"):
        drop |= {"steps", "checkpointing"}
    if case.get("grad"):
        drop |= {"steps", "checkpointing", "embeds"}
    if case.get("family") in PLAIN:
        drop |= {"checkpointing", "labels", "ignored", "padding", "num_items", "embeds", "mask"}
        drop |= {"logits", "layers", "attention", "save_head", "lora.trainable_token_indices"}
        drop |= {"lora.ensure_weight_tying"}
    return {name: value for name, value in case.items() if name not in drop}
