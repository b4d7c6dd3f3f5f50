"""How far a training is, for a display while it runs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from peftkit.finetune.processes import is_main, process_count
from peftkit.finetune.result import Usage
from peftkit.peak_memory import PeakMemory

_RECENT = 20
"""Steps over which times are averaged."""


@dataclass(frozen=True)
class Progress:
    """The state of a training after a step.

    Attributes:
        step: Optimiser steps that are done.
        steps: Optimiser steps in all.
        loss: The last loss that was logged.
        learning_rate: The learning rate of the first group of parameters.
        rows_per_second: Rows of all processes, over the last steps.
        tokens_per_second: Tokens of all processes, padding included, over the last steps; ``None`` if rows have no tokens.
        memory_bytes: Peak of the memory above that of the loaded model so far.
        planned_bytes: The peak that was planned, or ``None``.
        seconds_left: Time until the last step at the speed of the last steps, without evaluations.
    """

    step: int
    steps: int
    loss: float | None
    learning_rate: float | None
    rows_per_second: float
    tokens_per_second: float | None
    memory_bytes: int
    planned_bytes: int | None
    seconds_left: float


class WatchSteps(TrainerCallback):
    """Calls a function with the progress after each step, in the main process.

    Args:
        watch: The function.
        trainer: The trainer, which counts its tokens.
        usage: Has the plan of the memory, once it is made.
    """

    def __init__(self, watch: Callable[[Progress], None], trainer: Any, usage: Usage):
        self.watch, self.trainer, self.usage = watch, trainer, usage
        self._times: deque[float] = deque(maxlen=_RECENT)
        self._tokens: deque[int] = deque(maxlen=_RECENT)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._memory = PeakMemory(str(args.device))
        self._held = self._memory.now()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began, self._seen = time.monotonic(), self.trainer.tokens_seen

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not is_main():
            return
        self._times.append(time.monotonic() - self._began)
        self._tokens.append(self.trainer.tokens_seen - self._seen)
        seconds, steps = sum(self._times), len(self._times)
        rows = args.train_batch_size * args.gradient_accumulation_steps * process_count()
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        groups = self.trainer.optimizer.param_groups
        tokens = sum(self._tokens) * process_count() / seconds
        plan = self.usage.plan
        self.watch(
            Progress(
                step=state.global_step,
                steps=state.max_steps,
                loss=losses[-1] if losses else None,
                learning_rate=groups[0]["lr"],
                rows_per_second=rows * steps / seconds,
                tokens_per_second=tokens or None,
                memory_bytes=max(0, self._memory.peak() - self._held),
                planned_bytes=None if plan is None else plan.peak_bytes - plan.loaded_bytes,
                seconds_left=(state.max_steps - state.global_step) * seconds / steps,
            )
        )
