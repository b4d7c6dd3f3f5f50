"""Drop the worst runs of a sweep after a share of the steps."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

from peftkit.errors import ContractError
from peftkit.finetune.run_folder import RunFolder
from peftkit.finetune.together.conductor import Conductor

DROPPED = "dropped.json"
"""In the folder of a sweep: the runs that were dropped, with their losses."""

_PREFIX = "halving"
"""The names of this evaluation's metrics. Those of the run's own evaluations, by which it keeps its best checkpoint, begin with eval."""


class Halving(TrainerCallback):
    """Evaluates a run after a share of its steps, and stops it with a checkpoint unless it is among the best.

    Args:
        trainer: The trainer of the run.
        stopper: The callback that stops it.
        name: Its name.
        keep: Number of runs that go on.
        after: Share of the steps.
        conductor: Brings the losses of all runs together.
        folder: The folder of the sweep, which remembers the decision for runs that are resumed.
    """

    def __init__(
        self,
        trainer: Any,
        stopper: Any,
        name: str,
        keep: int,
        after: float,
        conductor: Conductor,
        folder: RunFolder,
    ):
        self.trainer, self.stopper, self.name = trainer, stopper, name
        self.keep, self.after = keep, after
        self.conductor, self.folder = conductor, folder
        self.step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = max(1, round(self.after * state.max_steps))
        if self.step >= state.max_steps:
            raise ContractError(
                f"after={self.after:g} of {state.max_steps} steps is step {self.step}, the last one, so no step would be saved; use a smaller "
                "share, or remove keep_best"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self.step or self.stopper.stopped:
            return
        # An evaluation clears these, although one that the recipe asks for at this step is yet to come.
        before = control.should_evaluate, control.should_log
        found = self.trainer.evaluate(metric_key_prefix=_PREFIX)
        control.should_evaluate, control.should_log = before
        loss = found[f"{_PREFIX}_loss"]
        if self.conductor.meet((self.name, loss), self._decide):
            return
        self.stopper.stopped, self.stopper.status = True, "dropped"
        control.should_save = control.should_training_stop = True

    def _decide(self, given: list[tuple[str, float]]) -> list[bool]:
        """Whether each run goes on."""
        known = self.folder.read_json(DROPPED)
        if known is None:
            # A loss that is not a number is the worst.
            order = sorted(given, key=lambda one: one[1] if math.isfinite(one[1]) else math.inf)
            known = dict(order[self.keep :])
            self.folder.write_json(DROPPED, known)
        return [name not in known for name, _ in given]
