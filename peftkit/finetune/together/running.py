"""Train several runs together, and what can be trained so."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftkit.errors import ContractError
from peftkit.finetune.processes import process_count
from peftkit.finetune.recipe import Recipe
from peftkit.finetune.run_folder import RECIPE, RunFolder
from peftkit.finetune.start import require_startable
from peftkit.finetune.tasks import require_task
from peftkit.finetune.tasks.base import Task
from peftkit.finetune.together.member import Extra, Member, Shared


def train_together(
    runs: Mapping[str, tuple[Recipe, Extra]], shared: Shared, say: Callable[[str], None]
) -> dict[str, str]:
    """Train runs to their ends, each in the folder of its recipe.

    Args:
        runs: For each name the recipe, and what makes further callbacks.
        shared: What the runs share.
        say: Is called with each line of progress.

    Returns:
        The errors of the runs that failed, by name.

    Raises:
        ContractError: A run cannot start; then none has.
    """

    def work(number: int, name: str) -> Callable[[], Any]:
        recipe, extra = runs[name]
        line = f"{name}: {{}}".format
        folder = RunFolder(recipe.out)
        return Member(number, recipe, folder, shared, extra, lambda text: say(line(text))).train

    works = [work(number, name) for number, name in enumerate(runs)]
    with _stopped_by_signals(shared.stop):
        try:
            strands = shared.conductor.run(works)
        finally:
            shared.passes.release()
    return {
        name: str(strand.error)
        for name, strand in zip(runs, strands, strict=True)
        if strand.error is not None
    }


def resumable(recipe: Recipe) -> Recipe:
    """The recipe of a run that goes on if it was started; one that ended before that begins."""
    return dataclasses.replace(
        recipe, resume=recipe.resume and (Path(recipe.out) / RECIPE).exists()
    )


def require_together(recipes: Mapping[str, Recipe]) -> None:
    """Raise ``ContractError`` unless the adapters of these recipes, by their names, can be trained together."""
    if process_count() > 1:
        raise ContractError(
            f"adapters are trained together in one process, but there are {process_count()}; start it without torchrun"
        )
    for name, recipe in recipes.items():
        _require_member(recipe, name)


def _require_member(recipe: Recipe, name: str) -> None:
    if recipe.strategy.name != "lora":
        raise ContractError(
            f"{name}: strategy={recipe.strategy.name!r} cannot be trained together with other adapters; use lora"
        )
    if recipe.distill is not None:
        raise ContractError(
            f"{name}: distill.teacher={recipe.distill.teacher!r} cannot teach several adapters together; train them separately"
        )
    if recipe.training.report_to:
        raise ContractError(
            f"{name}: training.report_to={recipe.training.report_to} would mix the metrics of adapters that are trained together; remove it"
        )
    if recipe.training.fsdp:
        raise ContractError(
            f"{name}: training.fsdp=true divides the model among processes, but adapters are trained together in one process; remove it"
        )
    task = require_task(recipe.task.name)
    if task.trainer is not Task.trainer:
        raise ContractError(
            f"{name}: task={recipe.task.name!r} has a trainer of its own, which cannot train several adapters together; train them separately"
        )
    options = recipe.strategy.options
    require_startable(recipe.strategy, name)
    if options.bias != "none":
        raise ContractError(
            f"{name}: strategy.bias={options.bias!r} trains the biases of the model itself, which the adapters share; remove it"
        )


@contextmanager
def _stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C stops all runs after their step, each with a checkpoint; a second one at once."""
    before: dict[int, Any] = {}

    def ask(number: int, frame: Any) -> None:
        stop()
        release()

    def release() -> None:
        while before:
            known, handler = before.popitem()
            signal.signal(known, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            before[number] = signal.signal(number, ask)
        except ValueError:
            break  # not the main thread, which alone gets signals
    try:
        yield
    finally:
        release()
