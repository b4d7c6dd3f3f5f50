"""What a model answers to a few rows before, while and after it is trained, in generative tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback

from peftkit.checks.reach import undisturbed
from peftkit.finetune.generation import room_for

_SHOWN = 200
"""Characters of a question and an answer in a line of progress."""


class Samples:
    """Answers to some rows. Random states, modes and gradients stay as they are.

    Args:
        task: The task; one that is not generative has no samples.
        model: The model that is trained.
        rows: The rows. Those whose prompt fills the model are left out.
        tokens: Largest number of new tokens of an answer.

    Attributes:
        found: What the folder of the run keeps: ``prompt``, ``expected``, ``before`` and ``after`` of each row.
    """

    def __init__(self, task: Any, model: Any, rows: Sequence[Any], tokens: int):
        self._task, self._model, self._tokens = task, model, tokens
        prompts = [(row, *task.prompt(row)) for row in rows] if task.generative else []
        self._prompts = [prompt for prompt in prompts if room_for(model, prompt[1]) > 0]
        self.found: list[dict[str, str]] = []

    def begin(self, known: list[dict[str, str]] | None) -> None:
        """Answer before the first step, or take the answers ``known`` of the run that is resumed if they are as many."""
        if known and len(known) == len(self._prompts):
            self.found = known
            return
        answers = self._answers(self._prompts)
        self.found = [
            {"prompt": self._task.question(row, ids), "expected": expected, "before": answer}
            for (row, ids, expected), answer in zip(self._prompts, answers, strict=True)
        ]

    def finish(self) -> None:
        """Answer after the last step."""
        for sample, answer in zip(self.found, self._answers(self._prompts), strict=True):
            sample["after"] = answer

    def first(self) -> tuple[str, str] | None:
        """The first question, and the answer at this moment; ``None`` if there are no samples."""
        if not self.found:
            return None
        return self.found[0]["prompt"], self._answers(self._prompts[:1])[0]

    def _answers(self, prompts: Sequence[tuple[Any, list[int], str]]) -> list[str]:
        with undisturbed(self._model):
            return [
                self._task.answer(self._model, ids, self._tokens, context=self._task.context(row))
                for row, ids, _ in prompts
            ]


class SaySamples(TrainerCallback):
    """Says what the model answers to the first sample, each time a checkpoint was saved before the last step."""

    def __init__(self, samples: Samples, say: Callable[[str], None]):
        self.samples, self.say = samples, say

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps or control.should_training_stop:
            return
        found = self.samples.first()
        if found is not None:
            question, answer = (_line(text) for text in found)
            self.say(f"step {state.global_step}: {question} -> {answer}")


def _line(text: str) -> str:
    """A text in one line: its end, if it is long."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"...{line[-_SHOWN:]}"
