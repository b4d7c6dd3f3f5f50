"""Load the teacher of a run and prove that its outputs mean the same as the student's."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftkit.errors import ContractError, count, short
from peftkit.finetune.data import Part
from peftkit.finetune.model import load_model, load_processor, longest_input, with_decoder_inputs
from peftkit.finetune.recipe import DistillRecipe, Recipe
from peftkit.finetune.tasks.base import Task

_DIGESTED = 256
"""Numbers of each weight that the digest of a teacher covers."""

_OF_CLASSES = ("processor_class", "image_processor_type", "feature_extractor_type")
"""Entries of a processor's settings that name its class and say nothing of what it does."""


class Teacher:
    """A frozen model in evaluation mode.

    Attributes:
        model: The model.
        inputs: Names of the inputs that its forward takes.
    """

    def __init__(self, model: Any):
        self.model = model.requires_grad_(False).eval()
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.inputs = set(inspect.signature(type(base).forward).parameters)

    @torch.no_grad()
    def outputs(self, batch: dict[str, Any], **more: Any) -> Any:
        """The outputs for a batch of the student, without a graph."""
        inputs = with_decoder_inputs(self.model, batch)
        given = {n: v for n, v in inputs.items() if n in self.inputs and n != "labels"}
        if "use_cache" in self.inputs:
            given["use_cache"] = False
        return self.model(**given, **more)

    def require_inputs(self, batch: dict[str, Any]) -> None:
        """Raise ``ContractError`` if the teacher cannot read an input that changes what the student sees."""
        unknown = sorted(batch.keys() - self.inputs - {"labels", "use_cache", "token_type_ids"})
        if unknown:
            raise ContractError(
                f"{type(self.model).__name__} takes no {', '.join(unknown)}, which the student gets; use a teacher of another architecture"
            )

    def digest(self) -> str:
        """A digest of the first numbers of each weight: whether the teacher of a resumed run is the same."""
        found = hashlib.blake2b(digest_size=16)
        for name, parameter in self.model.named_parameters():
            values = parameter.detach().reshape(-1)[:_DIGESTED].contiguous().view(torch.uint8)
            found.update(name.encode() + bytes(values.cpu().tolist()))
        return found.hexdigest()

    def size_bytes(self) -> int:
        """The memory of its weights."""
        return sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))


def load_teacher(recipe: Recipe, task: Task, train: Part) -> Teacher:
    """Load the teacher of a recipe, and check it against the student's task.

    Args:
        recipe: The recipe; ``distill`` is not ``None``.
        task: The student's task, with its classes.
        train: The student's rows.

    Raises:
        ContractError: The teacher cannot be loaded; its head is of another kind, or new; or its classes, tokens or pictures are not those of
            the student.
    """
    from peftkit.finetune.run_folder import RECIPE

    spec = recipe.distill
    assert spec is not None
    with _named(spec):
        folder = Path(spec.teacher)
        if (folder / RECIPE).is_file():
            model, processor = _of_run(spec, task)
        elif (folder / "adapter_config.json").is_file():
            raise ContractError(
                "it is an adapter without its base model; name the folder of the run that trained it, or merge it first (peftkit merge)"
            )
        else:
            model, processor = _of_model(recipe, spec, task)
        teacher = Teacher(model)
        _require_same_processor(task, processor)
        require_token_types(task, processor, train)
        _require_room(teacher.model, task, train)
        rows = list(train.dataset.select(range(min(2, len(train.dataset)))))
        teacher.require_inputs(task.first_batch(rows))
        task.check_model(teacher.model, rows)
        return teacher


@contextmanager
def _named(spec: DistillRecipe) -> Iterator[None]:
    """Name the teacher in an error."""
    try:
        yield
    except ContractError as error:
        raise ContractError(f"distill.teacher={spec.teacher!r}: {error}") from error


def _of_run(spec: DistillRecipe, task: Task) -> tuple[nn.Module, Any]:
    """The model of a finished run, with its processor."""
    from peftkit.finetune.tasks import require_task
    from peftkit.finetune.using import load_run, open_run

    own, folder = open_run(spec.teacher)
    if require_task(own.task.name).auto_class != task.auto_class:
        raise ContractError(
            f"the run has the task {own.task.name}, and the student {task.name}; use a teacher for the same task"
        )
    # Each process has the whole teacher on its own device.
    training = dataclasses.replace(own.training, fsdp=False)
    base = own.base if spec.base == "auto" else spec.base
    own = dataclasses.replace(own, base=base, training=training)
    own_task, model = load_run(own, folder)
    _require_same_classes(own_task.setting.labels, task)
    return model, own_task.setting.processor or own_task.setting.tokenizer


def _of_model(recipe: Recipe, spec: DistillRecipe, task: Task) -> tuple[nn.Module, Any]:
    """A checkpoint with a trained head, with its processor."""
    from peftkit.finetune.setup import config_of

    own = dataclasses.replace(
        recipe, model=spec.teacher, base=spec.base, weights="pretrained", adapter=None
    )
    if task.setting.labels:
        names = config_of(own).id2label or {}
        _require_same_classes([str(names[number]) for number in sorted(names)], task)
    processor = load_processor(own, task.processor)
    model = load_model(own, task, is_adapter=True)
    new = [n for n, p in model.named_parameters() if not getattr(p, "_is_hf_initialized", False)]
    if new:
        raise ContractError(
            f"the checkpoint has no weights for {new[0]}, so it knows nothing of the task {task.name}; train it first (peftkit train), and "
            "name the folder of that run"
        )
    return model, processor


def _require_same_classes(names: list[str], task: Task) -> None:
    if names != task.setting.labels:
        raise ContractError(
            f"its classes are {short(', '.join(names))}, and those of the data are {short(', '.join(task.setting.labels))}; they must have the "
            "same names in the same order. Train the teacher on the same classes"
        )


def _require_same_processor(task: Task, other: Any) -> None:
    """Raise ``ContractError`` unless the teacher would make the same tokens or pixels as the student."""
    own = task.setting.processor or task.setting.tokenizer
    if task.processor == "tokenizer":
        mine, theirs = own.get_vocab(), other.get_vocab()
        differ = sorted(t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t))
        if differ:
            token = differ[0]
            raise ContractError(
                f"{count(len(differ), 'token')} of its vocabulary and the student's differ, such as {token!r} (number {theirs.get(token)} of "
                f"the teacher, {mine.get(token)} of the student), so the outputs mean different tokens; use a teacher with the same tokenizer"
            )
        return
    mine, theirs = own.to_dict(), other.to_dict()
    differ = sorted(
        name
        for name in mine.keys() | theirs.keys()
        if mine.get(name) != theirs.get(name) and name not in _OF_CLASSES
    )
    if differ:
        name = differ[0]
        raise ContractError(
            f"its processor has other settings: {name}={short(theirs.get(name))}, and the student's {name}={short(mine.get(name))}; use a "
            "teacher that is trained with the same inputs"
        )


def require_token_types(task: Task, other: Any, train: Part) -> None:
    """Raise ``ContractError`` if the teacher marks the second text of a pair, and the student's tokenizer does not."""
    own = task.setting.tokenizer
    name = "token_type_ids"
    if task.processor != "tokenizer" or name in own.model_input_names:
        return
    if name not in other.model_input_names or "input_ids" not in train.dataset.column_names:
        return
    end = own.sep_token_id
    if any(sum(token == end for token in ids) > 1 for ids in train.dataset["input_ids"]):
        raise ContractError(
            "it needs token_type_ids to tell the texts of a pair apart, which the student's tokenizer does not make; use a teacher and a "
            "student of one kind for pairs of texts"
        )


def _require_room(model: Any, task: Task, train: Part) -> None:
    """Raise ``ContractError`` if the student's rows are too long for the teacher, or have tokens that it does not have."""
    from peftkit.finetune.setup import require_vocabulary

    if task.processor != "tokenizer":
        return
    require_vocabulary(model, task, train)
    longest = longest_input(model)
    if longest is not None and task.setting.seq_len > longest:
        raise ContractError(
            f"training.seq_len={task.setting.seq_len}, but it has positions for {longest} tokens; use at most that many"
        )
