"""What happens while the Trainer trains: metrics, stages, the best checkpoint, interruptions."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from peftkit.finetune.checkpoints import checkpoint_of, require_best
from peftkit.finetune.divided import train_only
from peftkit.finetune.processes import any_process, is_main, on_main
from peftkit.finetune.run_folder import METRICS, RunFolder, write_text
from peftkit.finetune.strategies.staged import trained_at


class KeepMetrics(TrainerCallback):
    """Writes each entry of the log as a line of ``metrics.jsonl``, and says it."""

    def __init__(self, folder: RunFolder, say: Callable[[str], None]):
        self.file, self.say = folder.path / METRICS, say

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not is_main():
            return
        # A resumed run continues the log of its checkpoint, not what came after it.
        write_text(self.file, "".join(json.dumps(entry) + "\n" for entry in state.log_history))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not is_main():
            return
        entry = {**(logs or {}), "step": state.global_step}
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        shown = {
            name: value
            for name, value in (logs or {}).items()
            if name in ("loss", "label_loss", "teacher_loss", "learning_rate", "grad_norm")
            or (name.startswith("eval_") and not name.endswith(("runtime", "_per_second")))
        }
        if shown:
            parts = ", ".join(f"{name} {_number(value)}" for name, value in shown.items())
            self.say(f"step {state.global_step}/{state.max_steps}: {parts}")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)


class NewDraws(TrainerCallback):
    """Tells the task which pass over the data begins, so that it hides, cuts or crops otherwise than in the last one."""

    def __init__(self, task: Any):
        self.task = task

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task.round = int(state.epoch or 0)


class RunStages(TrainerCallback):
    """Trains exactly the parameters of the stage that a step belongs to. The stage depends on the step alone."""

    def __init__(self, model: nn.Module, stages: list[tuple[int, set[str]]]):
        self.model, self.stages = model, stages

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        train_only(self.model, trained_at(self.stages, state.global_step))


class FindBest(TrainerCallback):
    """Finds the best checkpoint of a resumed run in the folder where the run is now, before the first step.

    The Trainer remembers its whole path, and forgets a best checkpoint that is lost.
    """

    def __init__(self, folder: Path, stops_early: bool):
        self.folder, self.stops_early = folder, stops_early

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.load_best_model_at_end and state.best_global_step:
            best = checkpoint_of(self.folder, state.best_global_step)
            on_main(lambda: require_best(best, self.stops_early))
            state.best_model_checkpoint = str(best)


class StopWithCheckpoint(TrainerCallback):
    """Saves a checkpoint and stops after a step: after ``stop_after``, or after the step in which Ctrl-C was pressed.

    A second Ctrl-C stops at once. With several processes all stop after the same step.

    Attributes:
        stopped: Whether it has stopped the training.
        status: What is written as the result of a run that was stopped.
    """

    def __init__(self, stop_after: int | None):
        self.stop_after = stop_after
        self.stopped, self.status = False, "stopped"
        self._asked = False
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def ask(number: int, frame: Any) -> None:
            self.ask()
            self.release()

        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, ask)
            except ValueError:
                return  # not the main thread, which alone gets signals

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reached = state.global_step == self.stop_after
        if (any_process(self._asked) or reached) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = self.stopped = True

    def ask(self) -> None:
        """Stop after this step."""
        self._asked = True

    def release(self) -> None:
        """Give the signals back."""
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
