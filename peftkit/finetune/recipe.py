"""The recipe: everything that decides a run, as a tree of dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from peftkit.finetune.schema import key

SET_BY_PEFTKIT = (
    "peft_type",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
)
"""Fields of PEFT's configs that are no keys of a recipe."""

_ALWAYS_WRITTEN = ("r", "lora_alpha")
"""Their defaults in recipes are not those of PEFT's config."""


@dataclass
class DataRecipe:
    """Where the rows are and how they are read."""

    train: Any = key(help="A file, a folder, a list of them, or hub:NAME[:SPLIT]")
    eval: Any = key(None, "The same for evaluation, or a share of the training rows, such as 0.1")
    format: Literal[
        "auto", "jsonl", "json", "csv", "tsv", "parquet", "text", "images", "sounds", "dataset"
    ] = key("auto", "Format of the files. auto looks at the ends of their names")
    columns: dict[str, str] = key(
        {}, "The task's name of a column, then the name in your data. Example: {text: review}"
    )
    max_rows: int | None = key(None, "Read only so many rows of each of train and eval", least=1)
    max_bad_rows: int = key(
        0, "Bad rows that are skipped and reported. One more stops the run", least=0
    )
    truncation: Literal["cut", "drop", "error"] = key(
        "cut", "What happens to rows that are longer than training.seq_len"
    )
    preview: int = key(2, "Samples to show as the model gets them, before training", least=0)


@dataclass
class TrainingRecipe:
    """How the model is trained. ``null`` means the default of the strategy or task."""

    lr: float | None = key(
        None, "Learning rate. null: 2e-5 for full tuning, ten times that for adapters", above=0
    )
    head_lr: float | None = key(
        None, "Learning rate of a new task head. null: ten times 2e-5 or more", above=0
    )
    layer_decay: float | None = key(
        None, "Each block has the learning rate of the next one times this number", above=0, below=1
    )
    lora_plus_ratio: float | None = key(
        None, "Learning rate of lora_B divided by that of lora_A", least=1
    )
    epochs: float | None = key(
        None, "Passes over the data. null: as the task says, if max_steps is null too", above=0
    )
    max_steps: int | None = key(None, "Number of optimiser steps, instead of epochs", least=1)
    batch_size: int = key(8, "Rows in one forward of a process", least=1)
    gradient_accumulation: int = key(1, "Forwards in one optimiser step", least=1)
    eval_batch_size: int | None = key(
        None, "Rows in one forward of the evaluation. null: batch_size", least=1
    )
    seq_len: int | None = key(
        None, "Largest number of tokens in a row. null: as the task says", least=2
    )
    optimizer: str = key("adamw_torch", "An optimiser of transformers' Trainer")
    weight_decay: float = key(0.0, "Weight decay of matrices", least=0)
    max_grad_norm: float = key(1.0, "Gradients are scaled down to this norm", above=0)
    scheduler: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
    ] = key("linear", "Shape of the learning rate")
    warmup: float = key(
        0.03,
        "Steps in which the learning rate rises: a share below 1, or a number of steps",
        least=0,
    )
    label_smoothing: float = key(
        0.0, "Share of the probability that goes to the other labels", least=0, below=1
    )
    precision: Literal["auto", "fp32", "bf16"] = key(
        "auto", "bf16 computes with autocast. auto is bf16 on GPUs that have it, otherwise fp32"
    )
    gradient_checkpointing: bool = key(
        False, "Compute activations a second time instead of keeping them"
    )
    fsdp: bool = key(
        False,
        "Divide the weights among the processes of torchrun; of an adapter's model the frozen ones",
    )
    checkpoint_every: int | Literal["epoch"] = key(
        "epoch",
        "Evaluate and save a checkpoint at the end of each epoch, or every so many steps",
        least=1,
    )
    keep_checkpoints: int = key(2, "Checkpoints to keep, besides the best one", least=1)
    best_metric: str | None = key(
        None,
        "Metric by which the best checkpoint is chosen. null: as the task says; last: keep the last",
    )
    early_stopping: int | None = key(
        None, "Stop after so many evaluations without a better metric", least=1
    )
    stop_after: int | None = key(
        None, "Stop after this step and save a checkpoint, as after Ctrl-C", least=1
    )
    log_every: int = key(10, "Steps between two lines in metrics.jsonl", least=1)
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = key(
        [], "Send the metrics to these as well; each needs its package"
    )
    samples: int = key(
        3,
        "Samples that are generated before and after training, in generative tasks; the first also at each checkpoint",
        least=0,
    )
    sample_tokens: int = key(64, "Largest number of new tokens of these samples", least=1)
    workers: int = key(0, "Processes that prepare batches", least=0)
    seed: int = key(0, "Seed of the new weights, the order of the rows and dropout", least=0)


@dataclass
class DistillRecipe:
    """A teacher whose outputs the model learns besides the labels."""

    teacher: str = key(help="Id on the Hub, folder of a model, or folder of a finished run")
    loss: Literal["logits", "hidden"] = key(
        "logits", "What is compared: the distributions over tokens or classes, or the hidden states"
    )
    weight: float = key(
        0.5, "Share of the teacher in the loss; the labels have the rest", above=0, most=1
    )
    temperature: float | None = key(
        None, "Both distributions are softened by this number. null: 2", above=0
    )
    base: str = key("auto", "How the teacher is stored, as base. nf4 takes the least memory")


@dataclass
class Choice:
    """The name of a task or strategy, and its options as an instance of the options' class."""

    name: str
    options: Any

    def to_dict(self) -> dict[str, Any]:
        """Return the name and the options that differ from the defaults."""
        return {"name": self.name, **changed(self.options)}


@dataclass
class Recipe:
    """One run, checked.

    Attributes:
        model: Id on the Hub, folder, or GGUF file.
        base: As for ``peftkit.load_base``.
        task: Name and options of the task.
        strategy: Name and options of what is trained.
        data: The data.
        training: The training.
        out: The folder of the run.
        resume: Continue from the last whole checkpoint in ``out``.
        adapter: Folder of a trained adapter whose values the new one starts from.
        weights: ``"pretrained"``, or ``"random"`` to train the architecture of ``model`` from scratch.
        distill: The teacher, or ``None``.
    """

    model: str
    base: str
    task: Choice
    strategy: Choice
    data: DataRecipe
    training: TrainingRecipe
    out: str
    resume: bool = False
    adapter: str | None = None
    weights: str = "pretrained"
    distill: DistillRecipe | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data, which ``read_recipe`` reads again. Data that was passed as an object is described."""
        data = dataclasses.asdict(dataclasses.replace(self.data, train=None, eval=None))
        data["train"], data["eval"] = described(self.data.train), described(self.data.eval)
        return {
            "model": self.model,
            "base": self.base,
            **({"adapter": self.adapter} if self.adapter else {}),
            **({"weights": self.weights} if self.weights != "pretrained" else {}),
            "task": self.task.to_dict(),
            "strategy": self.strategy.to_dict(),
            "data": {"train": data.pop("train"), "eval": data.pop("eval"), **data},
            "training": dataclasses.asdict(self.training),
            **({"distill": dataclasses.asdict(self.distill)} if self.distill else {}),
            "out": self.out,
        }


def batch_text(training: TrainingRecipe, facts: dict[str, Any]) -> str:
    """The size of a batch in words: rows in a forward, forwards in a step, and processes if there are several."""
    processes = facts.get("processes", 1)
    several = f" in each of {processes} processes" if processes > 1 else ""
    return f"{training.batch_size} x {training.gradient_accumulation}{several}"


def described(source: Any) -> Any:
    """A data source as plain data: paths and numbers as they are, objects as their type and size."""
    if source is None or isinstance(source, (str, int, float)):
        return source
    if isinstance(source, (list, tuple)) and all(isinstance(one, str) for one in source):
        return list(source)
    return f"<{type(source).__name__} with {len(source)} rows>"


def changed(options: Any) -> dict[str, Any]:
    """The fields of a dataclass whose values differ from the defaults, as plain data."""
    found = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if not field.init or field.name in SET_BY_PEFTKIT:
            continue
        if value == _default(field) and field.name not in _ALWAYS_WRITTEN:
            continue
        found[field.name] = _plain(value)
    return found


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return changed(value)
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(one) for one in (sorted(value) if isinstance(value, set) else value)]
    return getattr(value, "value", value)
