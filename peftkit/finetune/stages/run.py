"""Train the stages of a recipe one after the other, each in a folder of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from peftkit.errors import ContractError
from peftkit.finetune.processes import on_main
from peftkit.finetune.progress import Progress
from peftkit.finetune.recipe import Recipe
from peftkit.finetune.result import RunResult
from peftkit.finetune.run_folder import RECIPE, RESULT, RunFolder, write_text, written_recipe
from peftkit.finetune.run_lock import RunLock
from peftkit.finetune.stages.recipe import MERGED, Stage, StagedRecipe
from peftkit.finetune.stages.report import write_stages_report
from peftkit.finetune.tasks.base import Task
from peftkit.finetune.training import check_run, train

Watch = Callable[[Progress], None] | None


def train_stages(
    recipe: StagedRecipe, say: Callable[[str], None], watch: Watch = None
) -> RunResult:
    """Train all stages, or go on with the first one that is not finished.

    Before the first stage, the data of each stage and one step from the first model are checked, so that a fault in the last stage is
    found before the first one has been trained.

    Args:
        recipe: The recipe.
        say: Is called with each line of progress.
        watch: Is called after each step of a stage.

    Returns:
        The result of the last stage, with the steps of all stages, in the folder of the run.

    Raises:
        ContractError: As for ``train``; or a finished stage had problems, so that the next one should not go on with its weights.
    """
    folder = RunFolder(recipe.out)
    with closing(RunLock(folder.path, say)) as lock:
        return _train_stages(recipe, folder, lock, say, watch)


def _train_stages(
    recipe: StagedRecipe, folder: RunFolder, lock: RunLock, say: Callable[[str], None], watch: Watch
) -> RunResult:
    if recipe.resume:
        on_main(lambda: folder.require_same(recipe.to_dict()))
    else:
        on_main(folder.require_free)
        _check(recipe)
    on_main(lambda: _begin(recipe, folder, lock))
    results: list[RunResult] = []
    for index, stage in enumerate(recipe.stages):
        result = on_main(partial(finished_stage, stage))
        if result is None:
            say(f"stage {index + 1} of {len(recipe.stages)}: {stage.recipe.task.name}")
            with _named(recipe, index):
                before = recipe.stages[index - 1] if index else None
                result = _train_stage(stage, before, say, watch)
        results.append(result)
        total = _total(recipe, results)
        on_main(partial(_write, recipe, folder, results, total))
        if result.status != "finished" or result.problems:
            return total
    say(f"written to {folder.path}")
    return total


def _begin(recipe: StagedRecipe, folder: RunFolder, lock: RunLock) -> None:
    """Lock the folder and write the recipe, unless another run has started or ended there."""
    folder.path.mkdir(parents=True, exist_ok=True)
    lock.take()
    if not recipe.resume:
        folder.require_free()  # another run may have started during the checks
    elif (folder.read_json(RESULT) or {}).get("status") == "finished":
        raise ContractError(
            f"resume=true, but the run in {folder.path} is finished; start a new run in another folder"
        )
    write_text(folder.path / RECIPE, written_recipe(recipe))


def _write(
    recipe: StagedRecipe, folder: RunFolder, results: list[RunResult], total: RunResult
) -> None:
    """Write the result and the report of the stages so far."""
    folder.write_json(RESULT, total.to_dict() | {"stages": [r.to_dict() for r in results]})
    write_stages_report(recipe, results, total)


def _check(recipe: StagedRecipe) -> None:
    """Check each stage with the first model, and that a head that is carried has the classes of the next stage."""
    before = None
    for index, stage in enumerate(recipe.stages):
        with _named(recipe, index):
            task = check_run(recipe.as_first(index))
            if before is not None and stage.carry != "adapter":
                _require_same_classes(before, task)
        before = task


def _require_same_classes(before: Task, task: Task) -> None:
    if before.auto_class == task.auto_class and before.setting.labels != task.setting.labels:
        raise ContractError(
            f"the classes are {', '.join(task.setting.labels)}, but the head of the stage before has {', '.join(before.setting.labels)}; "
            "use lora in both stages with carry: adapter, with which the head is new"
        )


def finished_stage(stage: Stage) -> RunResult | None:
    """The result of a stage that is finished, or ``None``."""
    found = RunFolder(stage.recipe.out).read_json(RESULT)
    if not isinstance(found, dict) or found.get("status") != "finished":
        return None
    weights = found["weights"]
    return RunResult(
        **found | {"folder": Path(found["folder"]), "weights": weights and Path(weights)}
    )


def _train_stage(
    stage: Stage, before: Stage | None, say: Callable[[str], None], watch: Watch
) -> RunResult:
    if stage.carry == "merge" and before is not None:
        on_main(partial(_merge, before.recipe, say))
    started = on_main((Path(stage.recipe.out) / RECIPE).exists)
    return train(dataclasses.replace(stage.recipe, resume=started), say=say, watch=watch)


def _merge(recipe: Recipe, say: Callable[[str], None]) -> None:
    """Write the model of a finished stage with its adapter merged, unless it is there; the folder appears when it is complete."""
    from peftkit.finetune.using import load_run
    from peftkit.merging import merge

    target = Path(recipe.out) / MERGED
    if target.exists():
        return
    task, model = load_run(recipe, RunFolder(recipe.out))
    # The weights of a quantised base are decoded; the next stage quantises them again.
    quantised = recipe.base in ("int8", "nf4", "fp8")
    merge(
        model,
        target,
        "bf16" if quantised else "base",
        certificate=False,
        rounding="nearest",
        tokenizer=task.setting.tokenizer,
    )
    say(f"merged into {target}")


def _total(recipe: StagedRecipe, results: list[RunResult]) -> RunResult:
    """The result of the whole run so far."""
    last = results[-1]
    done = len(results) == len(recipe.stages) or last.status != "finished" or bool(last.problems)
    names = [f"{number}-{s.recipe.task.name}" for number, s in enumerate(recipe.stages, start=1)]
    return RunResult(
        Path(recipe.out),
        last.status if done else "running",
        sum(result.steps for result in results),
        last.metrics,
        last.weights if len(results) == len(recipe.stages) else None,
        [f"{n}: {p}" for n, r in zip(names, results, strict=False) for p in r.problems],
        [f"{n}: {note}" for n, r in zip(names, results, strict=False) for note in r.notes],
        last.trained,
    )


@contextmanager
def _named(recipe: StagedRecipe, index: int) -> Iterator[None]:
    """Name the stage in an error."""
    try:
        yield
    except ContractError as error:
        name = f"stage {index + 1} ({recipe.stages[index].recipe.task.name})"
        raise ContractError(f"{name}: {error}") from error
