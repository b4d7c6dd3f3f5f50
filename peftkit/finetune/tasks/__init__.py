"""Tasks: one module each, with columns, head, preprocessing, collator and metrics, behind one registry.

A new task is one file with a subclass of ``Task``, and its name in ``TASKS``.
"""

from __future__ import annotations

from importlib import import_module

from peftkit.errors import ContractError
from peftkit.finetune.schema import nearest
from peftkit.finetune.tasks.base import Task

TASKS = (
    "sft",
    "vision_chat",
    "preference",
    "causal_lm",
    "masked_lm",
    "span_corruption",
    "text_classification",
    "token_classification",
    "question_answering",
    "seq2seq",
    "image_classification",
    "image_text_retrieval",
    "semantic_segmentation",
    "object_detection",
    "audio_classification",
    "speech_ctc",
    "speech_seq2seq",
    "text_to_speech",
    "embeddings",
    "contrastive",
    "contrastive_images",
)
"""Each name is also that of the module with the task."""


def require_task(name: str) -> type[Task]:
    """Return a task by name.

    Raises:
        ContractError: There is none of this name.
    """
    if name not in TASKS:
        raise ContractError(
            f"task={name!r} is unknown{nearest(name, TASKS)}; use one of {', '.join(TASKS)}"
        )
    return import_module(f"peftkit.finetune.tasks.{name}").TASK


__all__ = ["TASKS", "Task", "require_task"]
