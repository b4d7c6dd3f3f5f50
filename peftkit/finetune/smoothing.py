"""Label smoothing for every kind of model that a task trains."""

from __future__ import annotations

from typing import Any

from transformers.trainer_pt_utils import LabelSmoother

from peftkit.finetune.tasks.base import Task


class TaskSmoother(LabelSmoother):
    """transformers' smoothing, with labels that are shifted where the task's model predicts the next token.

    The Trainer shifts them for a list of classes, in which those for images and text are missing.
    """

    def __init__(self, share: float, task: Task):
        super().__init__(epsilon=share)
        self._shifts = task.task_type == "CAUSAL_LM"

    def __call__(
        self, outputs: Any, labels: Any, shift_labels: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The smoothed loss; ``shift_labels`` is the Trainer's own choice and has no effect."""
        return super().__call__(outputs, labels, self._shifts, num_items_in_batch)
