"""From rows to the data sets that the Trainer gets: every bad, truncated or fully masked row is counted and named."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from peftkit.errors import ContractError, count, listing
from peftkit.finetune.processes import from_all, process_index
from peftkit.finetune.recipe import DataRecipe, Recipe
from peftkit.finetune.rows import Row, read_rows
from peftkit.finetune.tasks.base import TOKEN_COLUMNS, BadRow, Task

if TYPE_CHECKING:
    import datasets

_CHUNK = 1000
_SOURCE, _SUPERVISED = "source_row", "supervised_labels"
_NO_LABEL = "no label is left that the loss could use"


@dataclass
class Counts:
    """What happened to the rows of one part of the data.

    Attributes:
        read: Rows that were read.
        used: Rows that are used.
        bad: File, line and reason of each row that was skipped.
        truncated: Rows that were longer than ``seq_len``.
        masked: Rows of which no label was left; they are among the bad ones.
        samples: Rows of the model's data set, after splitting and packing.
        tokens: Tokens of the data set.
        supervised: Labels that take part in the loss.
        repeated: Texts of the evaluation that are training texts, too.
    """

    read: int = 0
    used: int = 0
    bad: list[str] = field(default_factory=list)
    truncated: int = 0
    masked: int = 0
    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    repeated: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as plain data."""
        return {**vars(self), "bad": len(self.bad), "bad_rows": self.bad[:20]}


@dataclass
class Part:
    """The training or the evaluation data.

    Attributes:
        dataset: Inputs of the model.
        counts: What happened to the rows.
        examples: The first rows as they were read, with the task's names of columns.
    """

    dataset: datasets.Dataset
    counts: Counts
    examples: list[dict[str, Any]]

    def model_rows(self) -> datasets.Dataset:
        """The inputs of the model alone."""
        return self.dataset.remove_columns([_SOURCE, _SUPERVISED])


def find_labels(recipe: Recipe, task: type[Task]) -> list[str]:
    """The names of the classes in the training data; empty for tasks without classes."""
    known = task.known_labels(recipe.task.options)
    if known:
        return known
    names: set[str] = set()
    faults: list[str] = []
    read = 0
    for row in _rows(recipe.data.train, recipe.data, "data.train"):
        read += 1
        try:
            names |= task.labels_of(_mapped(row, recipe.data.columns))
        except BadRow as error:
            faults.append(f"{row.where}: {error}")
    if not read:
        raise ContractError(
            "data.train has no row that can be used (0 read); check the path and data.format"
        )
    try:
        return task.find_labels(names, recipe.task.options)
    except ContractError as error:
        if not faults:
            raise
        # Otherwise bad rows are reported when the rows are encoded.
        raise ContractError(f"{error}. Rows without a label:\n{listing(faults)}") from None


def load_data(recipe: Recipe, task: Task) -> tuple[Part, Part | None]:
    """Read and encode the training and the evaluation data.

    Raises:
        ContractError: A file cannot be read, too many rows are bad, or none is left. The message names files and lines.
    """
    data = recipe.data
    share = data.eval if isinstance(data.eval, float) else None
    train = encode_rows(data.train, "data.train", recipe, task)
    if share is not None:
        train, evaluation = _split(train, share, recipe.training.seed)
    else:
        evaluation = (
            None if data.eval is None else encode_rows(data.eval, "data.eval", recipe, task)
        )
    task.check_rows(train.dataset, "data.train")
    if evaluation is not None:
        task.check_rows(evaluation.dataset, "data.eval")
        evaluation.counts.repeated = _repeated(train, evaluation)
    train = _finished(train, task if task.packs() else None)
    return train, None if evaluation is None else _finished(evaluation, None)


def _repeated(train: Part, evaluation: Part) -> int:
    """The number of encoded texts in the evaluation that are in the training data, with the same labels."""
    if not any(name in train.dataset.column_names for name in TOKEN_COLUMNS):
        return 0
    known = set(_digests(train))
    return sum(digest in known for digest in _digests(evaluation))


def _digests(part: Part) -> Iterator[bytes]:
    for row in part.model_rows():
        text = json.dumps(row, sort_keys=True, default=str)
        yield hashlib.blake2b(text.encode(), digest_size=16).digest()


def encode_rows(source: Any, name: str, recipe: Recipe, task: Task) -> Part:
    """Read and encode the rows of one source.

    Raises:
        ContractError: As for ``load_data``.
    """
    data, counts = recipe.data, Counts()
    examples: list[dict[str, Any]] = []
    table = _Table()
    for row in _rows(source, data, name):
        counts.read += 1
        try:
            values = _mapped(row, data.columns)
            encoded = task.encode(values)
            if any(one.length > task.setting.seq_len for one in encoded):
                counts.truncated += 1
                _refuse_long(row, max(one.length for one in encoded), task.setting.seq_len, data)
                if data.truncation == "drop":
                    continue
            if not any(one.supervised for one in encoded):
                counts.masked += 1
                raise BadRow(f"{_NO_LABEL}{_why_masked(encoded, task)}")
        except BadRow as error:
            counts.bad.append(f"{row.where}: {error}")
            continue
        counts.used += 1
        for one in encoded:
            table.add({**one.features, _SOURCE: counts.used - 1, _SUPERVISED: one.supervised})
        if len(examples) < max(recipe.training.samples, 200):
            examples.append(values)
    _require_good(counts, data, name)
    return Part(table.finish(), counts, examples)


def _rows(source: Any, data: DataRecipe, name: str) -> Iterator[Row]:
    for number, row in enumerate(read_rows(source, data.format, name)):
        if data.max_rows is not None and number >= data.max_rows:
            return
        yield row


def _mapped(row: Row, columns: dict[str, str]) -> dict[str, Any]:
    """The row with the task's names of the columns."""
    if row.values is None:
        raise BadRow(row.fault)
    values = dict(row.values)
    for wanted, own in columns.items():
        if own not in row.values:
            raise BadRow(
                f"no column {own!r}, which data.columns.{wanted} names (the row has {', '.join(map(repr, row.values)) or 'none'})"
            )
        values[wanted] = row.values[own]
    return values


def _refuse_long(row: Row, length: int, seq_len: int, data: DataRecipe) -> None:
    if data.truncation == "error":
        raise ContractError(
            f"{row.where} has {length} tokens, more than training.seq_len={seq_len}; raise seq_len, or set data.truncation to cut or drop"
        )


def _why_masked(encoded: list[Any], task: Task) -> str:
    longest = max((one.length for one in encoded), default=0)
    if longest > task.setting.seq_len:
        return f": it has {longest} tokens, and training.seq_len={task.setting.seq_len} cuts off what is supervised"
    return ""


def _require_good(counts: Counts, data: DataRecipe, name: str) -> None:
    if len(counts.bad) > data.max_bad_rows:
        raise ContractError(
            f"{count(len(counts.bad), 'bad row')} of {counts.read} in {name}, but data.max_bad_rows={data.max_bad_rows}:\n"
            f"{listing(counts.bad)}\nCorrect them, or raise data.max_bad_rows to skip them."
        )
    if counts.used == 0:
        raise ContractError(
            f"{name} has no row that can be used ({counts.read} read, {len(counts.bad)} bad, {counts.truncated} too long)"
            + (f":\n{listing(counts.bad)}" if counts.bad else "; check the path and data.format")
        )


class _Table:
    """Collects encoded rows as a ``datasets.Dataset``, chunk by chunk, so that few are Python objects at a time."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.chunks: list[Any] = []

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if len(self.rows) == _CHUNK:
            self._close()

    def finish(self) -> datasets.Dataset:
        import datasets

        if self.rows:
            self._close()
        return (
            datasets.concatenate_datasets(self.chunks)
            if self.chunks
            else datasets.Dataset.from_list([])
        )

    def _close(self) -> None:
        import datasets

        features = self.chunks[0].features if self.chunks else None
        self.chunks.append(datasets.Dataset.from_list(self.rows, features=features))
        self.rows = []


def _finished(part: Part, packer: Task | None) -> Part:
    """Count what is used, remove our own columns and pack the rows if there is a task to do so."""
    counts = replace(part.counts, supervised=sum(part.dataset[_SUPERVISED]))
    names = [name for name in TOKEN_COLUMNS if name in part.dataset.column_names]
    counts.tokens = sum(sum(map(len, part.dataset[name])) for name in names)
    dataset = part.model_rows()
    if packer is not None:
        table = _Table()
        for row in packer.pack(list(dataset)):
            table.add(row)
        dataset = table.finish()
    counts.samples = len(dataset)
    return Part(dataset, counts, part.examples)


def _split(part: Part, share: float, seed: int) -> tuple[Part, Part]:
    """Set a share of the rows aside for evaluation, by a draw that depends on the seed only."""
    rows = part.counts.used
    number = round(share * rows)
    if not 0 < number < rows:
        raise ContractError(
            f"data.eval={share:g} of {count(rows, 'row')} is {count(number, 'row')}; each part needs at least one, so give more rows or "
            "another share"
        )
    chosen = set(random.Random(seed).sample(range(rows), number))
    sources = part.dataset[_SOURCE]
    parts = []
    for held_out in (False, True):
        wanted = [i for i, source in enumerate(sources) if (source in chosen) is held_out]
        inside = [i for i in range(rows) if (i in chosen) is held_out]
        examples = [part.examples[i] for i in inside if i < len(part.examples)]
        counts = Counts(read=len(inside), used=len(inside))
        if not held_out:
            counts = replace(part.counts, used=len(inside))
        parts.append(Part(part.dataset.select(wanted), counts, examples))
    return parts[0], parts[1]


def fingerprint(dataset: datasets.Dataset) -> str:
    """A digest of all rows in order. A resumed run compares it."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in dataset.iter(_CHUNK):
        digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def require_same_rows(digest: str) -> None:
    """Raise unless all processes have the same training rows. Each process trains on its own share of them."""
    differ = [number for number, other in enumerate(from_all(digest)) if other != digest]
    if differ:
        raise ContractError(
            f"the training rows of process {process_index()} (from 0) are not those of process {differ[0]}; give every machine the same "
            "files, model and tokenizer"
        )
