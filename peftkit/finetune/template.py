"""``peftkit train --init TASK``: a recipe with a comment for every key."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from peftkit.finetune.recipe import DataRecipe, DistillRecipe, TrainingRecipe
from peftkit.finetune.strategies import strategy_names
from peftkit.finetune.strategies.registry import STRATEGIES
from peftkit.finetune.tasks import require_task

_MODELS = {
    "tokenizer": {
        "CAUSAL_LM": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "SEQ_2_SEQ_LM": "google-t5/t5-small",
        None: "sentence-transformers/all-MiniLM-L6-v2",
    },
    "audio": {None: "facebook/wav2vec2-base"},
    "speech": {None: "facebook/wav2vec2-base-960h"},
    "image": {None: "google/vit-base-patch16-224-in21k"},
}
_WRITTEN = {
    "data": ("train", "eval"),
    "training": ("lr", "epochs", "batch_size", "seq_len", "checkpoint_every", "seed"),
}
"""Keys that are written; the others are commented out with their defaults."""


def template(task_name: str) -> str:
    """A recipe for a task as YAML, with what can be set and what it means.

    Raises:
        ContractError: There is no such task.
    """
    task = require_task(task_name)
    models = {None: task.example_model} if task.example_model else _MODELS[task.processor]
    folders = task.processor in ("image", "audio")
    values: dict[str, Any] = {
        "train": "data/train" if folders else "data/train.jsonl",
        "eval": 0.1,
        "epochs": task.epochs,
        "seq_len": task.seq_len,
        "checkpoint_every": "epoch",
    }
    lines = [
        f"# {task.summary}",
        "# Train: peftkit train RECIPE.yaml [key=value ...]. Lines after # are defaults.",
        "",
        "# Id on the Hub, folder, or GGUF file",
        f"model: {models.get(task.task_type, models[None])}",
        "# auto, bf16, fp16, fp32; int8, nf4 and fp8 quantise the base of an adapter",
        "base: auto",
        "",
        "task:",
        f"  name: {task.name}",
        *_keys(task.Options, {}, ()),
        "",
        f"# One of {', '.join(strategy_names())}, or another method of PEFT",
        *[f"#   {name}: {STRATEGIES[name].summary}" for name in strategy_names()],
        "strategy:",
        "  name: lora",
        "  r: 16",
        "  lora_alpha: 32",
        "",
        "data:",
    ]
    columns = "; ".join(f"{name}: {meaning}" for name, meaning in task.columns.items())
    lines += [f"  # Columns of the task. {columns}"]
    lines += _keys(DataRecipe, values, _WRITTEN["data"])
    lines += ["", "training:"]
    hidden = ("seq_len",) if folders else ()
    lines += _keys(TrainingRecipe, values, [n for n in _WRITTEN["training"] if n not in hidden])
    if task.distils is not None:
        lines += [
            "",
            "# A larger model to learn from, besides the labels (docs/compression.md)",
            "# distill:",
        ]
        lines += [
            f"# {line}" for line in _keys(DistillRecipe, {"teacher": "runs/large"}, ("teacher",))
        ]
    lines += ["", "# A new folder for the run", f"out: runs/{task.name}", ""]
    return "\n".join(lines)


def _keys(cls: Any, values: dict[str, Any], written: Any) -> list[str]:
    lines = []
    for field in dataclasses.fields(cls):
        default = field.default
        if default is dataclasses.MISSING:
            default = (
                field.default_factory()
                if field.default_factory is not dataclasses.MISSING
                else None
            )
        value = values.get(field.name, default)
        lines.append(f"  # {field.metadata['help']}")
        mark = "  " if field.name in written else "  # "
        lines.append(f"{mark}{field.name}: {_yaml(value)}")
    return lines


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
