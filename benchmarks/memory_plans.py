"""Planned memory against that of a real step: models, methods, bases, checkpointing, optimisers and shapes on the CPU.

    python benchmarks/run.py plan
    python benchmarks/run.py plan --only llama

The peak of a real step is that of torch's own allocations, from the memory events of its profiler over two steps, and the tensors
that the model and the batch held before. Memory that C code takes for itself, such as work space of the native passes, is not counted.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from report import environment, machine, save
from stepping import allocated_peak
from torch import Tensor, nn

HELP = "planned memory against that of real steps"
MEDIAN_BOUND, WORST_BOUND = 0.03, 0.08

_SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 4, "head_dim": 32}
_PAIR = {
    "d_model": 256,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 688,
    "decoder_ffn_dim": 688,
    "vocab_size": 4096,
}
_GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", _GROUPED),
    "gemma2": ("Gemma2ForCausalLM", _GROUPED | _GEMMA),
    "gemma3": ("Gemma3ForCausalLM", _GROUPED | _GEMMA),
    "mistral": ("MistralForCausalLM", _GROUPED | {"sliding_window": 64}),
    "phi3": ("Phi3ForCausalLM", _SIZES | {"num_key_value_heads": 4}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 4096, "n_embd": 256, "n_layer": 4, "n_head": 8}),
    "bloom": (
        "BloomForCausalLM",
        {"vocab_size": 4096, "hidden_size": 256, "n_layer": 4, "n_head": 8},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        _GROUPED | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
    ),
    "mixtral": ("MixtralForCausalLM", _GROUPED | {"num_local_experts": 4}),
    "olmoe": (
        "OlmoeForCausalLM",
        _GROUPED | {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 256},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        _GROUPED
        | {"num_local_experts": 4, "num_experts_per_tok": 2}
        | {"intermediate_size": 256, "sliding_window": 64},
    ),
    "bert": ("BertForMaskedLM", _SIZES),
    "bert_classes": ("BertForSequenceClassification", _SIZES),
    "deberta": (
        "DebertaV2ForMaskedLM",
        _SIZES | {"relative_attention": True, "pos_att_type": ["c2p"]},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 4096,
            "d_model": 256,
            "d_kv": 32,
            "d_ff": 688,
            "num_layers": 3,
            "num_heads": 8,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": ("BartForConditionalGeneration", _PAIR | {"encoder_layers": 3, "decoder_layers": 3}),
    "whisper": (
        "WhisperForConditionalGeneration",
        _PAIR
        | {
            "encoder_layers": 2,
            "decoder_layers": 2,
            "num_mel_bins": 40,
            "max_source_positions": 256,
        }
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    ),
    "vit": ("ViTForImageClassification", _SIZES | {"image_size": 128, "patch_size": 8}),
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 32, "hidden_sizes": [64, 128, 256], "depths": [2, 2, 2]},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [32, 64, 128, 256], "depths": [2, 2, 3, 2]},
    ),
    "efficientnet": (
        "EfficientNetForImageClassification",
        {"image_size": 112, "width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
    ),
    # A real step would drop layers at random.
    "wav2vec2": (
        "Wav2Vec2ForSequenceClassification",
        _SIZES | {"conv_dim": [64] * 7, "layerdrop": 0.0},
    ),
    "wav2vec2_ctc": ("Wav2Vec2ForCTC", _SIZES | {"conv_dim": [64] * 7, "layerdrop": 0.0}),
    "segformer": (
        "SegformerForSemanticSegmentation",
        {
            "hidden_sizes": [32, 64, 128, 160],
            "decoder_hidden_size": 64,
            "drop_path_rate": 0.0,
            "image_size": 112,
        },
    ),
    "clip": (
        "CLIPModel",
        {
            "text_config": _SIZES,
            "vision_config": _SIZES | {"image_size": 128, "patch_size": 8},
            "projection_dim": 64,
        },
    ),
    "bert_answers": ("BertForQuestionAnswering", _SIZES),
}
"""A class of transformers and the values of its config."""

_AS_PLANNED = "wav2vec2_ctc", "segformer", "clip", "bert_answers"
"""Models whose batch is that of the plan."""

_WITHOUT_TOKENS = "resnet", "convnext", "efficientnet", "wav2vec2", "wav2vec2_ctc", "segformer"
"""Models with convolutions, for which the usual batch of tokens is none."""

_NO_SIZE = 224
"""Pixels of a side of an image for a config that says none, as ``plan`` assumes."""


def _lora(**changes: Any) -> Callable[[], list[Any]]:
    def configs() -> list[Any]:
        from peft import LoraConfig

        return [LoraConfig(r=16, lora_alpha=32, **changes)]

    return configs


def _bottleneck(placement: str) -> Callable[[], list[Any]]:
    def configs() -> list[Any]:
        from peftkit import BottleneckConfig

        return [BottleneckConfig(bottleneck_size=32, placement=placement)]

    return configs


def _prefix(gate: bool) -> Callable[[], list[Any]]:
    def configs() -> list[Any]:
        from peftkit import PrefixConfig

        return [PrefixConfig(num_virtual_tokens=16, gate=gate)]

    return configs


METHODS: dict[str, Callable[[], list[Any]]] = {
    "full": lambda: ["full"],
    "lora": _lora(),
    "lora with dropout": _lora(lora_dropout=0.1),
    "dora": _lora(use_dora=True),
    "houlsby": _bottleneck("houlsby"),
    "pfeiffer": _bottleneck("pfeiffer"),
    "parallel": _bottleneck("parallel"),
    "prefix": _prefix(gate=False),
    "gated prefix": _prefix(gate=True),
    "all three": lambda: [*_lora()(), *_prefix(gate=True)(), *_bottleneck("houlsby")()],
}


@dataclass(frozen=True, slots=True)
class PlannedCase:
    """One combination."""

    model: str
    method: str
    base: str = "fp32"
    batch_size: int = 4
    seq_len: int = 256
    checkpointing: bool = False
    optimizer: str = "adamw"

    def __str__(self) -> str:
        """The combination in words."""
        extra = ", checkpointed" if self.checkpointing else ""
        shape = f"{self.batch_size} x {self.seq_len}"
        return f"{self.model}, {self.method}, {self.base}, {shape}, {self.optimizer}{extra}"


CASES = (
    *(PlannedCase("llama", method) for method in METHODS),
    *(PlannedCase("llama", method, checkpointing=True) for method in METHODS),
    *(
        PlannedCase("llama", method, base)
        for base in ("nf4", "int8", "bf16")
        for method in ("lora", "dora", "houlsby", "gated prefix")
    ),
    PlannedCase("llama", "lora with dropout", "nf4", 2, 512, checkpointing=True),
    PlannedCase("llama", "lora", "fp8"),
    PlannedCase("llama", "full", "bf16", checkpointing=True),
    PlannedCase("llama", "full", optimizer="sgd"),
    PlannedCase("llama", "full", optimizer="adafactor", batch_size=1, seq_len=128),
    PlannedCase("llama", "full", optimizer="adamw_fused", batch_size=1, seq_len=64),
    PlannedCase("llama", "lora", batch_size=1, seq_len=1024),
    PlannedCase("llama", "lora", batch_size=16, seq_len=32),
    *(PlannedCase(model, "lora") for model in MODELS if model not in ("llama", *_WITHOUT_TOKENS)),
    *(PlannedCase(model, "full") for model in ("qwen3_moe", "bert", "t5", "vit", "gpt2")),
    PlannedCase("qwen3_moe", "lora", "bf16"),
    PlannedCase("mixtral", "houlsby", checkpointing=True),
    PlannedCase("qwen3_moe", "lora", "nf4"),
    PlannedCase("mixtral", "dora", "nf4", checkpointing=True),
    PlannedCase("olmoe", "houlsby", "nf4", 2, 128),
    PlannedCase("gpt_oss", "lora", "nf4", 2, 128, checkpointing=True),
    PlannedCase("vit", "pfeiffer"),
    PlannedCase("vit", "lora", "bf16"),
    *(PlannedCase(model, "full") for model in ("resnet", "convnext", "efficientnet")),
    PlannedCase("resnet", "full", "bf16", 12),
    PlannedCase("convnext", "lora", "bf16", 8),
    *(PlannedCase("wav2vec2", method, "fp32", 4, 4000) for method in ("full", "lora")),
    PlannedCase("wav2vec2_ctc", "full", "fp32", 4, 4000),
    *(PlannedCase("segformer", method) for method in ("full", "lora")),
    PlannedCase("clip", "full"),
    PlannedCase("bert", "parallel"),
    PlannedCase("t5", "gated prefix"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--only", metavar="TEXT", help="cases whose name contains TEXT")


def run(arguments: argparse.Namespace) -> None:
    """Plan and measure every case, save the result and print the table."""
    torch.set_num_threads(1)
    cases = [case for case in CASES if not arguments.only or arguments.only in str(case)]
    result = {"environment": environment(), "rows": rows(cases)}
    if not arguments.only:
        save(result, "plan")
    print(table(result))
    errors = [error_of(row) for row in result["rows"]]
    if statistics.median(errors) > MEDIAN_BOUND or max(errors) > WORST_BOUND:
        raise SystemExit("the plans are less exact than they must be")


def rows(cases: Iterable[PlannedCase]) -> list[dict[str, Any]]:
    """One row for each case: ``case``, ``planned_bytes``, ``measured_bytes``, ``loaded_bytes``."""
    found = []
    for case in cases:
        planned = planned_peak(case)
        measured, loaded = measured_peak(case)
        found.append(
            {
                "case": str(case),
                "planned_bytes": planned,
                "measured_bytes": measured,
                "loaded_bytes": loaded,
            }
        )
    return found


def error_of(row: dict[str, Any]) -> float:
    """The difference of plan and measurement, relative to what a step adds to the loaded model."""
    difference = abs(row["planned_bytes"] - row["measured_bytes"])
    return difference / (row["measured_bytes"] - row["loaded_bytes"])


def table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table, with the errors."""
    lines = [
        f"**memory plans** ({machine(result['environment'])})",
        "",
        "| model, method, base, batch, optimiser | loaded (MiB) | planned peak (MiB) | measured peak (MiB) | error of what the step adds |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        sizes = (row[f"{name}_bytes"] / 2**20 for name in ("loaded", "planned", "measured"))
        numbers = " | ".join(f"{size:.1f}" for size in sizes)
        lines.append(f"| {row['case']} | {numbers} | {error_of(row):.2%} |")
    errors = sorted(map(error_of, result["rows"]))
    lines += [
        "",
        f"{len(errors)} combinations: median error {statistics.median(errors):.2%}, largest {errors[-1]:.2%}.",
    ]
    return "\n".join(lines)


def config_of(case: PlannedCase) -> Any:
    """The config of the case's model."""
    import transformers

    name, values = MODELS[case.model]
    cls = getattr(transformers, name).config_class
    dtypes = {"bf16": torch.bfloat16}
    return cls(**values, architectures=[name], dtype=dtypes.get(case.base, torch.float32))


def planned_peak(case: PlannedCase) -> int:
    """The peak by the plan."""
    from peftkit import plan

    made = plan(
        config_of(case),
        *METHODS[case.method](),
        base="auto" if case.base == "fp32" else case.base,  # type: ignore[arg-type]
        batch_size=case.batch_size,
        seq_len=case.seq_len,
        optimizer=case.optimizer,  # type: ignore[arg-type]
        checkpointing=case.checkpointing,
        device="cpu",
    )
    return made.peak_bytes


def measured_peak(case: PlannedCase) -> tuple[int, int]:
    """The peak of two real steps, and what the loaded model and the batch need."""
    from peftkit_kernels.core import workspace

    workspace.release()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = real_model(case)
        batch = real_batch(case, model)
        step = real_step(case, model, batch)
        gc.collect()
        loaded = _bytes_of(
            [
                *(*model.parameters(), *model.buffers(), *_of_storage(model)),
                *(value for value in batch.values() if isinstance(value, Tensor)),
            ]
        )
        most = allocated_peak(lambda: (step(), step()))
    return loaded + most, loaded


def real_model(case: PlannedCase) -> nn.Module:
    """The model with random weights and new adapters."""
    import transformers

    from peftkit import load_base, wrap

    torch.manual_seed(0)
    config = config_of(case)
    model: Any = getattr(transformers, MODELS[case.model][0])._from_config(
        config, dtype=config.dtype
    )
    if case.base in ("nf4", "int8", "fp8"):
        model = load_base(model, case.base)  # type: ignore[arg-type]
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    configs = METHODS[case.method]()
    return (model if configs == ["full"] else wrap(model, *configs)).train()


def real_batch(case: PlannedCase, model: Any) -> dict[str, Tensor]:
    """Random inputs and labels of the case's sizes."""
    if case.model in _AS_PLANNED:
        from peftkit.planning.batches import batch_of

        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return batch_of(base, case.batch_size, case.seq_len)
    config, shape = model.config, (case.batch_size, case.seq_len)
    dtype = config.dtype
    name = MODELS[case.model][0]
    if name.endswith("Classification"):
        labels = torch.randint(0, config.num_labels, shape[:1])
    else:
        labels = torch.randint(3, config.vocab_size, shape)
    if name.endswith("ForImageClassification"):
        side = getattr(config, "image_size", _NO_SIZE)
        sizes = (case.batch_size, 3, side, side)
        return {"pixel_values": torch.randn(sizes).to(dtype), "labels": labels}
    if case.model == "wav2vec2":
        return {"input_values": torch.randn(shape).to(dtype), "labels": labels}
    if case.model == "whisper":
        sizes = (case.batch_size, config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": torch.randn(sizes).to(dtype), "labels": labels}
    return {"input_ids": torch.randint(3, config.vocab_size, shape), "labels": labels}


def real_step(case: PlannedCase, model: Any, batch: dict[str, Tensor]) -> Callable[[], None]:
    """A training step."""
    from transformers.optimization import Adafactor

    trained = [p for p in model.parameters() if p.requires_grad]
    makers: dict[str, Callable[[], Any]] = {
        "adamw": lambda: torch.optim.AdamW(trained, lr=1e-4),
        "adamw_fused": lambda: torch.optim.AdamW(trained, lr=1e-4, fused=True),
        "sgd": lambda: torch.optim.SGD(trained, lr=1e-4),
        "adafactor": lambda: Adafactor(
            trained, lr=1e-4, scale_parameter=False, relative_step=False
        ),
    }
    optimizer = makers[case.optimizer]()

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _of_storage(model: nn.Module) -> list[Tensor]:
    """The tensors of quantised weights that are no parameters."""
    found: list[Any] = []
    owners: list[Any] = [*model.parameters(), *model.modules()]  # of linears, of stacks of experts
    for owner in owners:
        found.append(getattr(owner, "SCB", None))
        state = getattr(owner, "quant_state", None)
        if state is not None:
            inner = state.state2
            found += [state.absmax, state.code, state.offset, inner.absmax, inner.code]
    return [t for t in found if isinstance(t, Tensor)]


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
