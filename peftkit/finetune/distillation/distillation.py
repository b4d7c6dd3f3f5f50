"""What a teacher adds to the loss of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkit.checks.reach import on_device_of, undisturbed
from peftkit.errors import ContractError
from peftkit.finetune.data import Part
from peftkit.finetune.distillation.losses import (
    divergence,
    hidden_distance,
    labelled,
    select,
    token_shares,
)
from peftkit.finetune.distillation.teacher import Teacher, load_teacher
from peftkit.finetune.processes import process_count
from peftkit.finetune.recipe import DistillRecipe, Recipe
from peftkit.finetune.tasks.base import Task

TEMPERATURE = 2.0
"""Temperature if the recipe has none."""


class Distillation:
    """A teacher, and how the student is compared with it.

    Attributes:
        recipe: The section of the recipe.
        teacher: The teacher.
    """

    def __init__(self, recipe: DistillRecipe, task: Task, teacher: Teacher):
        self.recipe, self.teacher = recipe, teacher
        self._positions: Any = task.distils

    @property
    def more_inputs(self) -> dict[str, Any]:
        """Arguments of the student's forward besides the batch."""
        return {"output_hidden_states": True} if self.recipe.loss == "hidden" else {}

    def loss(self, outputs: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The distance from the teacher, summed over the outputs that have a label, and their number.

        Args:
            outputs: The student's outputs for the batch.
            batch: The batch, with its labels.
        """
        used = labelled(batch["labels"], self._positions)
        if self.recipe.loss == "hidden":
            teacher = self.teacher.outputs(batch, **self.more_inputs).hidden_states
            shares = token_shares(used, batch)
            return hidden_distance(outputs["hidden_states"], teacher, shares), used.sum()
        student = select(outputs["logits"], used, "student")
        teacher = select(self.teacher.outputs(batch).logits, used, "teacher")
        distance = divergence(student, teacher, self.recipe.temperature or TEMPERATURE)
        return distance, used.sum()

    def mix(self, own: Tensor, taught: Tensor) -> Tensor:
        """The loss of a step from that of the labels and that of the teacher."""
        weight = self.recipe.weight
        return (1 - weight) * own + weight * taught


def prepare_distillation(
    recipe: Recipe, task: Task, model: Any, train: Part
) -> tuple[Distillation | None, list[str]]:
    """Load the teacher of a recipe and compare it with the student on the first batch.

    Args:
        recipe: The recipe, resolved.
        task: The task.
        model: The student, ready for training.
        train: The training rows.

    Returns:
        ``None`` if the recipe has no teacher, and notes.

    Raises:
        ContractError: The teacher does not fit, or the loss is not finite.
    """
    if recipe.distill is None:
        return None, []
    if torch.cuda.device_count() > 1 and process_count() == 1:
        # The Trainer would divide each batch among the GPUs, and each of their losses by all labels.
        raise ContractError(
            f"distill.teacher={recipe.distill.teacher!r} in one process with {torch.cuda.device_count()} GPUs; start the run with torchrun "
            "--nproc_per_node, or set CUDA_VISIBLE_DEVICES=0"
        )
    teacher = load_teacher(recipe, task, train)
    found = Distillation(recipe.distill, task, teacher)
    rows = list(train.dataset.select(range(min(recipe.training.batch_size, len(train.dataset)))))
    batch = on_device_of(model, task.first_batch(rows))
    with undisturbed(model):
        distance, number = found.loss(model(**batch, **found.more_inputs), batch)
    value = (distance / number).item()
    if not torch.isfinite(distance):
        raise ContractError(
            f"distill.teacher={recipe.distill.teacher!r}: the distance from the teacher is {value} on the first batch; check the teacher's "
            "weights, and use distill.base=fp32"
        )
    parameters = sum(p.numel() for p in teacher.model.parameters())
    return found, [
        f"teacher {recipe.distill.teacher} ({parameters:,} numbers, {teacher.size_bytes() / 2**20:.1f} MiB), distance before training "
        f"{value:.4g}"
    ]
