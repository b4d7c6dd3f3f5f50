"""``train``: one run, from a recipe to a folder with the trained weights and a report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

from peftkit.errors import ContractError, count
from peftkit.finetune.parallel_limits import require_parallel
from peftkit.finetune.processes import (
    from_all,
    is_main,
    on_main,
    process_count,
    process_index,
    together,
)
from peftkit.finetune.reading import read_recipe
from peftkit.finetune.recipe import Recipe
from peftkit.finetune.result import RunResult, Usage
from peftkit.finetune.run_folder import (
    DATA,
    ENVIRONMENT,
    RECIPE,
    RESULT,
    SAMPLES,
    RunFolder,
    write_text,
    written_recipe,
)
from peftkit.finetune.run_lock import RunLock, removed_if_unused
from peftkit.finetune.stages.recipe import StagedRecipe
from peftkit.finetune.together.recipe import AdaptersRecipe

if TYPE_CHECKING:
    from peftkit.finetune.distillation import Distillation
    from peftkit.finetune.progress import Progress
    from peftkit.finetune.samples import Samples
    from peftkit.finetune.tasks.base import Task


def train(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe | StagedRecipe | AdaptersRecipe,
    *overrides: str,
    say: Callable[[str], None] = lambda line: None,
    watch: Callable[[Progress], None] | None = None,
) -> RunResult:
    """Train a model as a recipe says.

    Everything is checked before the first step: the recipe, the rows, the model, and one forward and backward. Until then nothing is
    written. In a process that torchrun has started, this is one run of all its processes; the first of them writes and speaks.

    Args:
        recipe: A YAML file, a mapping with the same keys, or what ``peftkit.finetune.read_recipe`` returns.
        overrides: ``"training.lr=1e-4"``, as for ``read_recipe``.
        say: Is called with each line of progress.
        watch: Is called after each step with its ``peftkit.finetune.progress.Progress``; not for a recipe with ``adapters``.

    Returns:
        The result. The folder has the recipe, the environment, ``metrics.jsonl``, ``report.md`` and the trained weights.

    Raises:
        ContractError: The recipe, the data or the model cannot be used, or the loss is not finite. The message names the cause
            and a way out.
    """
    with together():
        if isinstance(recipe, (Recipe, StagedRecipe, AdaptersRecipe)):
            if overrides:
                raise ContractError("a Recipe takes no overrides; pass them to read_recipe")
        else:
            recipe = read_recipe(recipe, overrides)
        if isinstance(recipe, AdaptersRecipe):
            from peftkit.finetune.together.adapters import train_adapters

            return train_adapters(recipe, say)
        require_parallel(recipe)
        say = say if is_main() else _say_nothing
        if isinstance(recipe, StagedRecipe):
            from peftkit.finetune.stages.run import train_stages

            return train_stages(recipe, say, watch)
        folder = RunFolder(recipe.out)
        on_main(folder.require_run if recipe.resume else folder.require_free)
        return SingleRun(recipe, folder, say, watch).train()


def _say_nothing(line: str) -> None:
    pass


def check_run(recipe: Recipe) -> Task:
    """Check the rows, the model and one step of a recipe, without writing anything.

    Returns:
        The task, with its classes.

    Raises:
        ContractError: As for ``train``.
    """
    return SingleRun(recipe, RunFolder(recipe.out), _say_nothing).prepare()[0]


class SingleRun:
    """The steps of a run, and what they share."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        say: Callable[[str], None],
        watch: Callable[[Progress], None] | None = None,
    ):
        self.recipe, self.folder, self.say, self.watch = recipe, folder, say, watch
        self.lock = RunLock(folder.path, say)
        self.usage = Usage()
        self.distillation: Distillation | None = None

    def prepare(self) -> tuple[Any, Any, Any, Any, Any, list[str]]:
        """Load the data and the model, and check the first step."""
        from transformers import set_seed

        from peftkit.finetune.distillation import prepare_distillation
        from peftkit.finetune.setup import resolved

        recipe = self.recipe
        set_seed(recipe.training.seed)
        task, train, evaluation = self.load_data()
        self.recipe = recipe = resolved(recipe, task)
        if recipe.resume:
            self.folder.require_same(recipe.to_dict())
        set_seed(recipe.training.seed)
        model, stages, notes = self.load_model(task, train)
        self.distillation, taught = prepare_distillation(recipe, task, model, train)
        for note in taught:
            self.say(note)
        notes += taught
        return task, train, evaluation, model, stages, notes

    def load_data(self) -> tuple[Any, Any, Any]:
        """Load the task, the training rows and the evaluation rows."""
        from peftkit.finetune.setup import prepare_data

        return prepare_data(self.recipe, self.say)

    def load_model(self, task: Any, train: Any) -> tuple[Any, Any, list[str]]:
        """Load the model, apply the strategy and check the first step."""
        from peftkit.finetune.setup import prepare_model

        return prepare_model(self.recipe, task, train, self.say)

    def train(self) -> RunResult:
        """Train, or go on from the last checkpoint, while no other process can do so in the folder."""
        with closing(self.lock), removed_if_unused(self.folder, self.lock):
            if self.recipe.resume:
                on_main(self.folder.require_run)
                on_main(self.lock.take)
            return self._train()

    def _train(self) -> RunResult:
        from transformers import set_seed

        from peftkit.finetune.data import fingerprint, require_same_rows
        from peftkit.finetune.outcome import base_buffers, digests
        from peftkit.finetune.resuming import find_checkpoint
        from peftkit.finetune.run_page import memory_text
        from peftkit.finetune.samples import Samples, SaySamples
        from peftkit.finetune.setup import is_adapter, repeated_notes
        from peftkit.peak_memory import PeakMemory

        task, train, evaluation, model, stages, notes = self.prepare()
        recipe, say = self.recipe, self.say
        facts = {
            "fingerprint": fingerprint(train.dataset),
            "labels": task.setting.labels,
            "train": train.counts.to_dict(),
            "eval": None if evaluation is None else evaluation.counts.to_dict(),
            "processes": process_count(),
        }
        if self.distillation is not None:
            facts["teacher"] = self.distillation.teacher.digest()
        require_same_rows(facts["fingerprint"])
        checkpoint = None
        if recipe.resume:
            checkpoint, broken = find_checkpoint(self.folder, facts, say)
            notes += broken
        notes += repeated_notes(evaluation)
        before = digests(model) | (base_buffers(model) if is_adapter(recipe) else {})
        trainer, stopper = self.make_trainer(task, model, train, evaluation, stages)
        rows = (evaluation or train).examples[: recipe.training.samples]
        samples = Samples(task, model, rows, recipe.training.sample_tokens)
        samples.begin(on_main(lambda: self.folder.read_json(SAMPLES)) if recipe.resume else None)
        trainer.add_callback(SaySamples(samples, say))
        self.plan(task, trainer, train)
        on_main(lambda: self._start(facts, samples.found))
        # Other rows of a batch need other dropout.
        set_seed(recipe.training.seed + process_index())
        memory = PeakMemory(str(trainer.args.device))
        held, began = memory.reset(), time.monotonic()
        try:
            if checkpoint is None or not trainer.load_finished(checkpoint):
                trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        except ContractError as error:
            failed = RunResult(
                self.folder.path, "failed", trainer.state.global_step, problems=[str(error)]
            )
            # A disk that is full takes no result, either; the error itself says why.
            with suppress(OSError):
                if is_main():
                    self._write_result(failed)
            raise
        finally:
            stopper.release()
        self.usage.measured_bytes = memory.peak() - held
        self.usage.seconds = time.monotonic() - began
        say(memory_text(self.usage.plan, self.usage.measured_bytes) or "memory was not measured")
        steps = trainer.state.global_step
        if stopper.stopped:
            say(f"{stopper.status} after step {steps}; continue with resume=true")
            result = RunResult(self.folder.path, stopper.status, steps, notes=notes)
            return on_main(lambda: self._write_result(result))
        return self._finish(task, model, trainer, before, facts, samples, notes)

    def make_trainer(
        self, task: Any, model: Any, train: Any, evaluation: Any, stages: Any
    ) -> tuple[Any, Any]:
        """Build the trainer with its callbacks, and the callback that stops it."""
        from peftkit.finetune.callbacks import (
            FindBest,
            KeepMetrics,
            NewDraws,
            RunStages,
            StopWithCheckpoint,
        )
        from peftkit.finetune.progress import WatchSteps
        from peftkit.finetune.trainer import groups_of, make_trainer

        trainer = make_trainer(
            self.recipe,
            task,
            model,
            train.dataset,
            None if evaluation is None else evaluation.dataset,
            str(self.folder.checkpoints),
        )
        trainer.distillation = self.distillation
        groups_of(model, self.recipe.training)  # raises before anything is written
        stopper = StopWithCheckpoint(self.recipe.training.stop_after)
        trainer.add_callback(KeepMetrics(self.folder, self.say))
        trainer.add_callback(FindBest(self.folder.checkpoints, trainer.stops_early))
        trainer.add_callback(stopper)
        trainer.add_callback(NewDraws(task))
        if self.watch is not None:
            trainer.add_callback(WatchSteps(self.watch, trainer, self.usage))
        if stages is not None:
            trainer.add_callback(RunStages(model, stages))
        return trainer, stopper

    def plan(self, task: Any, trainer: Any, train: Any) -> None:
        """Plan the memory of a step, and say it."""
        from peftkit.finetune.planned import plan_of_run
        from peftkit.finetune.run_page import memory_text

        self.usage.plan, why = plan_of_run(self.recipe, task, trainer, train)
        self.say(memory_text(self.usage.plan, None) or f"memory is not planned: {why}")

    def _start(self, facts: dict[str, Any], samples: list[dict[str, str]]) -> None:
        """Write what is known before the first step."""
        from peftkit.environment import describe_environment

        self.folder.path.mkdir(parents=True, exist_ok=True)
        self.lock.take()
        if not self.recipe.resume:
            self.folder.require_free()  # another run may have started while this one was checked
        self.folder.checkpoints.mkdir(exist_ok=True)
        write_text(self.folder.path / RECIPE, written_recipe(self.recipe))
        self.folder.write_json(ENVIRONMENT, describe_environment())
        self.folder.write_json(DATA, facts)
        self.folder.write_json(SAMPLES, samples)
        self.folder.write_json(RESULT, {"status": "running"})

    def _write_result(self, result: RunResult) -> RunResult:
        self.folder.write_json(RESULT, result.to_dict())
        return result

    def _finish(
        self,
        task: Any,
        model: Any,
        trainer: Any,
        before: dict[str, str],
        facts: dict[str, Any],
        samples: Samples,
        notes: list[str],
    ) -> RunResult:
        """Check the weights, evaluate, and write weights, card and report."""
        from peftkit.finetune.divided import is_divided, whole_weights
        from peftkit.finetune.outcome import digests, judge
        from peftkit.finetune.report import write_report, write_run_page
        from peftkit.finetune.setup import is_adapter
        from peftkit.finetune.weights import save_weights

        problems, more = judge(model, before, is_adapter(self.recipe))
        if len({tuple(sorted(one.items())) for one in from_all(digests(model))}) > 1:
            problems.append("the processes have ended with different weights")
        history = list(trainer.state.log_history)
        if trainer.has_no_best:
            problems.append(
                f"no evaluation found a number for {trainer.args.metric_for_best_model}, so the best checkpoint is not known; the weights are "
                "those of the last step"
            )
        losses = [entry["loss"] for entry in history if "loss" in entry]
        metrics = {"train_loss": sum(losses) / len(losses)} if losses else {}
        if trainer.eval_dataset is not None:
            # Under a name of its own, because the weights may be those of an earlier step.
            found = trainer.evaluate(metric_key_prefix="final")
            metrics |= {
                name.replace("final_", "eval_", 1): value
                for name, value in found.items()
                if name.startswith("final_")
                and not name.endswith(("_time", "runtime", "per_second"))
            }
        samples.finish()
        result = RunResult(
            self.folder.path,
            "finished",
            trainer.state.global_step,
            metrics,
            problems=problems,
            notes=[*notes, *more],
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        )

        state = whole_weights(model) if is_divided(model) else None

        def write() -> RunResult:
            self.folder.write_json(SAMPLES, samples.found)
            result.weights = save_weights(
                self.recipe, task, model, self.folder, metrics, facts, state
            )
            answers = samples.found
            write_report(
                self.recipe, model, self.folder, result, facts, history, answers, self.usage
            )
            write_run_page(self.recipe, self.folder, result, history, answers, self.usage)
            self.say(f"written to {self.folder.path} ({count(len(problems), 'problem')})")
            return self._write_result(result)

        return on_main(write)
