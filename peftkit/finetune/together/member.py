"""One of several runs that are trained together: an ordinary run that shares its model, and perhaps its rows, with the others.

On a GPU steps with few tokens are computed jointly. Otherwise a step of one run keeps the device busy, and the runs take turns: each goes on to its
end, or to the next point at which all have to meet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from peftkit.finetune.recipe import Recipe
from peftkit.finetune.run_folder import RunFolder
from peftkit.finetune.setup import adapt_model, first_rows, make_task, own_loss
from peftkit.finetune.together.agreement import require_agreement
from peftkit.finetune.together.base import SharedBase
from peftkit.finetune.together.conductor import Conductor, joined
from peftkit.finetune.together.passes import JointPasses, pays
from peftkit.finetune.together.places import Places, Route
from peftkit.finetune.training import SingleRun

Extra = Callable[[Any, Any], list[TrainerCallback]]
"""Makes callbacks of a run from its trainer and the callback that stops it."""


class Shared:
    """What runs that are trained together share.

    Args:
        same_rows: Whether all runs have the rows of the first.

    Attributes:
        places: Where the adapters are.
        conductor: Gives the turn to one run after the other.
        passes: Computes batches of several runs at once.
        base: The frozen model.
        is_joint: Whether steps are computed jointly; known once all adapters are on the model.
        stoppers: The callbacks that stop the runs.
        on_ready: Is called once everything is checked, before anything is written.
    """

    def __init__(self, same_rows: bool) -> None:
        self.same_rows = same_rows
        self.places = Places(Route())
        self.conductor = Conductor(self.places.show)
        self.passes = JointPasses(self.conductor, self.places)
        self.stoppers: list[Any] = []
        self.data: tuple[Any, Any, Any] | None = None
        self.base = SharedBase()
        self.is_joint = False
        self.on_ready: Callable[[], None] = lambda: None

    def stop(self) -> None:
        """Stop all runs after their next step, each with a checkpoint."""
        for stopper in self.stoppers:
            stopper.ask()


class Member(SingleRun):
    """A run that is trained together with others.

    Args:
        number: Its number, from 0.
        recipe: Its recipe. The runs differ in the adapter and its training.
        folder: Its folder.
        shared: What it shares with the others.
        extra: Callbacks of its own, made from the trainer and the callback that stops it.
        say: Is called with each line of progress.
    """

    def __init__(
        self,
        number: int,
        recipe: Recipe,
        folder: RunFolder,
        shared: Shared,
        extra: Extra,
        say: Callable[[str], None],
    ):
        super().__init__(recipe, folder, say)
        self.number, self.shared, self.extra = number, shared, extra

    def load_data(self) -> tuple[Any, Any, Any]:
        """Load the rows, or use those of the first run; the task is always a new one, because it counts passes over the rows."""
        if not self.shared.same_rows:
            return super().load_data()
        if self.shared.data is None:
            self.shared.data = super().load_data()
            return self.shared.data
        first, train, evaluation = self.shared.data
        return make_task(self.recipe, first.setting.labels), train, evaluation

    def load_model(self, task: Any, train: Any) -> tuple[Any, Any, list[str]]:
        """Put the adapter on the model of the first run, and compare a joint step, if there will be any, with one of this adapter alone."""
        shared = self.shared
        base = shared.base.load(self.recipe, task, train)
        model, stages, notes = adapt_model(self.recipe, task, train, base, self.say)
        shared.places.keep(self.number, model)
        tokens = self.recipe.training.batch_size * task.setting.seq_len
        pays_here = pays(
            next(model.parameters()).device.type, tokens if task.processor == "tokenizer" else None
        )
        shared.conductor.meet(pays_here, self._choose)
        if shared.is_joint:
            shared.passes.share(model)
            shared.conductor.meet(None, lambda given: given)
            batch = task.first_batch(first_rows(self.recipe, train))
            require_agreement(model, batch, own_loss(task), self.number, shared.passes)
            notes.append("trained together with other adapters; time and memory are those of all")
        else:
            notes.append(
                "trained by turns with other adapters on one frozen model; memory is that of all"
            )
        shared.conductor.meet(None, self._ready)
        return model, stages, notes

    def _choose(self, given: list[bool]) -> list[bool]:
        self.shared.is_joint = all(given)
        return given

    def _ready(self, given: list[Any]) -> list[Any]:
        # From here on the fault of one run does not end the others.
        self.shared.conductor.strict = False
        self.shared.on_ready()
        return given

    def make_trainer(
        self, task: Any, model: Any, train: Any, evaluation: Any, stages: Any
    ) -> tuple[Any, Any]:
        """The trainer of an ordinary run, whose steps and evaluations may be computed together with those of others."""
        trainer, stopper = super().make_trainer(task, model, train, evaluation, stages)
        if self.shared.is_joint:
            trainer.accelerator.backward = self.shared.passes.backward
            for name in ("training_step", "evaluate"):
                setattr(trainer, name, _joined(getattr(trainer, name)))
        self.shared.stoppers.append(stopper)
        for callback in self.extra(trainer, stopper):
            trainer.add_callback(callback)
        return trainer, stopper

    def plan(self, task: Any, trainer: Any, train: Any) -> None:
        """Do nothing: a plan would be that of one run alone."""


def _joined(work: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with joined():
            return work(*args, **kwargs)

    return run
