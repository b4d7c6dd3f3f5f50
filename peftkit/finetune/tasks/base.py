"""What every task has: columns, a loader, preprocessing, a collator and metrics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftkit.errors import ContractError, short

if TYPE_CHECKING:
    import torch

    from peftkit.finetune.recipe import Recipe

IGNORED = -100
"""Labels of this value take no part in the loss."""

TOKEN_COLUMNS = ("input_ids", "anchor", "positive", "chosen_ids", "rejected_ids")
"""Columns of encoded rows that have token ids."""


class BadRow(Exception):
    """A row that cannot be used. The message says why; it is reported with the row's file and line."""


@dataclass(frozen=True)
class Encoded:
    """One row as the model gets it.

    Attributes:
        features: Name of an input of the model to a list of numbers.
        length: Number of tokens before truncation.
        supervised: Number of labels that take part in the loss.
    """

    features: dict[str, Any]
    length: int
    supervised: int


@dataclass
class NoOptions:
    """Options of a task without options."""


@dataclass
class Setting:
    """What a task works with in one run.

    Attributes:
        tokenizer: The tokenizer, the image processor, or the processor of CTC models.
        seq_len: Largest number of tokens in a row.
        options: The task's options.
        labels: Names of the classes in the order of their numbers; empty if the task has none.
        config: The model's config.
        seed: Seed of the run.
        processor: What makes the inputs of a model for images or recordings and texts, and contains the tokenizer; ``None`` in other tasks.
    """

    tokenizer: Any
    seq_len: int
    options: Any
    labels: list[str] = field(default_factory=list)
    config: Any = None
    seed: int = 0
    processor: Any = None


class Task:
    """One kind of task.

    Attributes:
        name: The name in recipes.
        summary: One line for the documentation.
        auto_class: transformers' Auto class of the model with the head.
        task_type: PEFT's name for the kind of task, or ``None``.
        columns: Column to its meaning. A recipe maps them to the columns of the data.
        Options: A dataclass of its options.
        metric_names: Metrics of an evaluation besides the loss.
        lower_is_better: Metrics of which the smallest value is the best.
        best_metric: The metric by which the best checkpoint is chosen.
        generative: Whether ``peftkit generate`` and samples make sense.
        epochs: Passes over the data if the recipe has no length.
        seq_len: Largest number of tokens if the recipe has none.
        processor: ``"tokenizer"``, ``"image"``, ``"image and text"``, ``"audio"``, ``"speech"`` or ``"speech and text"``.
        example_model: Id of a model for the recipe of ``--init``, if it is not the usual one.
        answers_images: Whether ``peftkit generate`` takes images.
        answers_audio: Whether ``peftkit generate`` takes recordings instead of prompts.
        label_names: Names of the labels in a batch.
        has_own_loss: Whether ``loss`` computes the loss instead of the model.
        has_own_counts: Whether ``counted`` makes of each batch of an evaluation what the metrics need.
        writes_in_evaluation: Whether the metrics compare what ``written`` writes for each batch of an evaluation.
        smooths_labels: Whether ``training.label_smoothing`` has an effect. It has none on a loss of the task's own.
        distils: How labels belong to the outputs for a teacher: ``"next"`` if an output is compared with the label of the next position,
            ``"same"`` if with its own. ``None``: the task takes no teacher.
        lr_share: The default learning rate divided by that of the strategy.
        round: Number of the pass over the training rows, or -1 in an evaluation.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    auto_class: ClassVar[str]
    task_type: ClassVar[str | None] = None
    columns: ClassVar[dict[str, str]]
    Options: ClassVar[Any] = NoOptions
    metric_names: ClassVar[tuple[str, ...]] = ()
    lower_is_better: ClassVar[tuple[str, ...]] = ("loss",)
    best_metric: ClassVar[str] = "loss"
    generative: ClassVar[bool] = False
    epochs: ClassVar[float] = 3.0
    seq_len: ClassVar[int] = 512
    processor: ClassVar[str] = "tokenizer"
    example_model: ClassVar[str | None] = None
    answers_images: ClassVar[bool] = False
    answers_audio: ClassVar[bool] = False
    label_names: ClassVar[tuple[str, ...]] = ("labels",)
    has_own_loss: ClassVar[bool] = False
    has_own_counts: ClassVar[bool] = False
    writes_in_evaluation: ClassVar[bool] = False
    smooths_labels: ClassVar[bool] = True
    distils: ClassVar[Literal["next", "same"] | None] = None
    lr_share: ClassVar[float] = 1.0

    def __init__(self, setting: Setting):
        self.setting = setting
        self.round = 0

    @classmethod
    def labels_of(cls, row: dict[str, Any]) -> set[str]:
        """The names of the classes in a row; a task without classes has none."""
        return set()

    @classmethod
    def known_labels(cls, options: Any) -> list[str]:
        """The classes that the options name; then the training rows are not searched for them."""
        return []

    @classmethod
    def find_labels(cls, names: set[str], options: Any) -> list[str]:
        """The classes in the order of their numbers, from the names in the training rows."""
        return []

    def model_arguments(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` that the head needs."""
        if not self.setting.labels:
            return {}
        return {
            "num_labels": len(self.setting.labels),
            "id2label": dict(enumerate(self.setting.labels)),
            "label2id": {label: number for number, label in enumerate(self.setting.labels)},
        }

    def fit_model(self, model: Any) -> None:
        """Change what the loaded model needs for the task, such as its generation config, and keep what batches need to know of it.

        It is called whenever the model was loaded, before adapters are added.

        Raises:
            ContractError: The model does not fit the task's options.
        """

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        """Make inputs of the model from a row, at most ``seq_len`` tokens long.

        Raises:
            BadRow: The row cannot be used.
        """
        raise NotImplementedError

    def check_rows(self, rows: Any, name: str) -> None:
        """Raise ``ContractError`` if all encoded rows of a part of the data together cannot be used.

        Args:
            rows: The encoded rows.
            name: ``"data.train"`` or ``"data.eval"``.
        """

    def packs(self) -> bool:
        """Whether ``pack`` puts several training rows in one."""
        return False

    def pack(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Put several encoded training rows in one."""
        raise NotImplementedError

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch."""
        raise NotImplementedError

    def first_batch(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make the batch of the check before training, for which the model computes a loss."""
        return self.collate(rows)

    def draws(self, rows: list[dict[str, Any]]) -> torch.Generator:
        """Random numbers for a batch, which depend on its rows, the pass over the data and the seed.

        The Trainer prepares batches ahead, so numbers from torch's own generator would be others after a run was resumed.
        """
        import torch

        text = json.dumps([self.setting.seed, self.round, rows], sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))

    def render(self, features: dict[str, Any]) -> str:
        """Show a row as the model gets it, with the supervised part between « and »."""
        raise NotImplementedError

    def outside_loss(self, model: Any, rows: list[dict[str, Any]]) -> list[str]:
        """Names of modules on which an adapter would get no gradient, because the loss of these rows does not depend on them."""
        return []

    def check_model(self, model: Any, rows: list[dict[str, Any]]) -> None:
        """Raise ``ContractError`` if the model, with its adapter, does not fit the task."""

    def keep_of_logits(self, logits: Any, labels: Any) -> Any:
        """What the metrics need of the logits of a batch, made small."""
        return logits

    def counted(self, inputs: dict[str, Any], outputs: Any) -> tuple[Any, Any]:
        """What the metrics need of a batch as predictions and as labels, if ``has_own_counts``: tensors whose first axis is the rows.

        The second axis may differ from batch to batch; it is filled up with -100.
        """
        raise NotImplementedError

    def written(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Token ids that the model writes for a batch, if ``writes_in_evaluation``: ``Int64[rows, length]``."""
        raise NotImplementedError

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Compute the metrics; ``predictions`` are what ``keep_of_logits`` returned for all rows."""
        return {}

    def scores(self, rows: Any, predictions: Any, labels: Any) -> dict[str, float]:
        """Compute the metrics with the encoded rows, for tasks in which several rows belong together."""
        return self.metrics(predictions, labels)

    def loss(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
        """The loss and the outputs, if ``has_own_loss``."""
        raise NotImplementedError

    def trainer(
        self, recipe: Recipe, settings: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Another trainer than ``RecipeTrainer``.

        Args:
            recipe: The recipe of the run.
            settings: The fields of ``TrainingArguments``.

        Returns:
            The class and its arguments besides the model and the data, or ``None``.
        """
        return None

    def prompt(self, row: dict[str, Any]) -> tuple[list[int], str]:
        """The token ids of a row's prompt and the expected answer, in generative tasks."""
        raise NotImplementedError

    def prompt_of_text(self, text: str) -> list[int]:
        """The token ids of a prompt that a user typed."""
        raise NotImplementedError

    def decoded(self, ids: list[int]) -> str:
        """The text of a prompt, as it is reported."""
        return self.setting.tokenizer.decode(ids)

    def question(self, row: dict[str, Any], ids: list[int]) -> str:
        """What a sample of the report was asked: ``ids`` are its prompt."""
        return self.decoded(ids)

    def answer(
        self,
        model: Any,
        ids: list[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        context: dict[str, torch.Tensor] | None = None,
    ) -> str:
        """Let the model answer a prompt, as ``peftkit.finetune.generation.answer`` does."""
        from peftkit.finetune.generation import answer

        return answer(model, self.setting.tokenizer, ids, max_new_tokens, temperature, context)

    def context(self, row: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Inputs for the prompt of a row besides its tokens, such as pixels."""
        return {}

    def prompt_with_images(
        self, text: str, images: Sequence[str]
    ) -> tuple[list[int], dict[str, torch.Tensor]]:
        """The token ids of a prompt about images, and the inputs besides them, if ``answers_images``."""
        raise NotImplementedError

    def prompt_of_audio(self, path: str) -> tuple[list[int], dict[str, torch.Tensor]]:
        """The token ids with which an answer about a recording starts, and the inputs besides them, if ``answers_audio``.

        Raises:
            BadRow: The recording cannot be used.
        """
        raise NotImplementedError


def text_of(row: dict[str, Any], column: str, *, optional: bool = False) -> str:
    """Return a column as text.

    Raises:
        BadRow: The column is missing, empty or of another type.
    """
    value = row.get(column)
    if value is None and column not in row and not optional:
        raise BadRow(f"no column {column!r} (the row has {', '.join(map(repr, row)) or 'none'})")
    if value is None or value == "":
        if optional:
            return ""
        raise BadRow(f"column {column!r} is empty")
    if not isinstance(value, str):
        raise BadRow(
            f"column {column!r} is {short(value)} of type {type(value).__name__}, not text"
        )
    if not value.strip() and not optional:
        raise BadRow(f"column {column!r} is blank")
    return value


def pad(rows: list[list[int]], value: int, multiple: int = 8) -> torch.Tensor:
    """Pad lists of numbers on the right, to a multiple of ``multiple``: ``Int64[rows, length]``."""
    import torch

    longest = max(map(len, rows))
    longest = -(-longest // multiple) * multiple
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def pad_tokens(rows: list[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad the token ids of rows, with their attention mask and, if the rows have them, token types."""
    batch = {
        "input_ids": pad([row["input_ids"] for row in rows], pad_id),
        "attention_mask": pad([[1] * len(row["input_ids"]) for row in rows], 0),
    }
    if "token_type_ids" in rows[0]:
        batch["token_type_ids"] = pad([row["token_type_ids"] for row in rows], 0)
    return batch


def marked(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> str:
    """Decode token ids and put « and » around the runs whose labels are not ignored."""
    parts, run, inside = [], [], False
    for token, label in [*zip(ids, labels, strict=True), (None, IGNORED)]:
        used = label != IGNORED
        if used != inside or token is None:
            text = tokenizer.decode(run) if run else ""
            parts.append(f"«{text}»" if inside else text)
            run, inside = [], used
        if token is not None:
            run.append(token)
    return "".join(parts)


def number_of_label(value: Any, labels: list[str], column: str = "label") -> int:
    """The number of a class.

    Raises:
        BadRow: It is no class of the training data.
    """
    if value is None or value == "":
        raise BadRow(f"column {column!r} is empty")
    name = label_name(value)
    if name not in labels:
        raise BadRow(f"label {short(value)} is not one of {', '.join(labels)}")
    return labels.index(name)


def label_name(value: Any) -> str:
    """The name of a class. Whole numbers and texts are names."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise BadRow(
            f"label {short(value)} is of type {type(value).__name__}, not a name or a whole number"
        )
    return str(value)


def sorted_labels(names: set[str], least: int = 2) -> list[str]:
    """The names of classes in order; numbers in the order of their values.

    Raises:
        ContractError: There are too few.
    """
    if len(names) < least:
        raise ContractError(
            f"the training rows have {len(names)} different labels ({', '.join(sorted(names)) or 'none'}), but at least {least} are "
            "needed; check data.columns.label"
        )
    return sorted(names, key=int) if all(n.lstrip("-").isdigit() for n in names) else sorted(names)
