"""Train the adapters of a recipe together, each in a folder of its own, with one report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from peftkit.errors import ContractError
from peftkit.finetune.recipe import changed, described
from peftkit.finetune.report import table
from peftkit.finetune.result import RunResult
from peftkit.finetune.run_folder import (
    RECIPE,
    REPORT,
    RESULT,
    RunFolder,
    write_text,
    written_recipe,
)
from peftkit.finetune.run_lock import RunLock, removed_if_unused
from peftkit.finetune.together.member import Shared
from peftkit.finetune.together.recipe import AdaptersRecipe
from peftkit.finetune.together.running import require_together, resumable, train_together


def train_adapters(recipe: AdaptersRecipe, say: Callable[[str], None]) -> RunResult:
    """Train all adapters, or go on with those that are not finished.

    Args:
        recipe: The recipe.
        say: Is called with each line of progress.

    Returns:
        The result in the folder of the run. The metrics have the names of the adapters before them.

    Raises:
        ContractError: As for ``train``; or every adapter failed.
    """
    require_together(recipe.adapters)
    folder = RunFolder(recipe.out)
    if recipe.resume:
        folder.require_same(recipe.to_dict())
        if (folder.read_json(RESULT) or {}).get("status") == "finished":
            raise ContractError(
                f"resume=true, but the run in {folder.path} is finished; start a new run in another folder"
            )
    else:
        folder.require_free()
    with closing(RunLock(folder.path, say)) as lock, removed_if_unused(folder, lock):
        if recipe.resume:
            lock.take()
        errors = _train(recipe, folder, lock, say)
        results = {name: _result(own.out) for name, own in recipe.adapters.items()}
        total = _total(folder, results, errors)
        folder.write_json(RESULT, total.to_dict() | {"adapters": results})
        _write_report(recipe, results, total)
    say(f"written to {folder.path}")
    if len(errors) == len(recipe.adapters):
        raise ContractError(f"every adapter failed; the first: {total.problems[0]}")
    return total


def _train(
    recipe: AdaptersRecipe, folder: RunFolder, lock: RunLock, say: Callable[[str], None]
) -> dict[str, str]:
    """Train the adapters that are not finished; returns the errors of those that failed."""
    shared = Shared(same_rows=False)

    def started() -> None:
        folder.path.mkdir(parents=True, exist_ok=True)
        if not lock.is_taken:
            lock.take()
            folder.require_free()  # another run may have started during the checks
        write_text(folder.path / RECIPE, written_recipe(recipe))
        folder.write_json(RESULT, {"status": "running"})

    shared.on_ready = started
    left = {
        name: (resumable(own), _nothing)
        for name, own in recipe.adapters.items()
        if _result(own.out).get("status") != "finished"
    }
    return train_together(left, shared, say)


def _nothing(trainer: Any, stopper: Any) -> list[Any]:
    return []


def _result(out: str) -> dict[str, Any]:
    return RunFolder(out).read_json(RESULT) or {}


def _total(folder: RunFolder, results: dict[str, Any], errors: dict[str, str]) -> RunResult:
    """The result of the whole run."""
    statuses = [one.get("status", "failed") for one in results.values()]
    status = next((word for word in ("stopped", "failed") if word in statuses), "finished")
    problems = [f"{name}: {error}" for name, error in errors.items()]
    for name, one in results.items():
        if name not in errors:
            problems += [f"{name}: {problem}" for problem in one.get("problems", [])]
    return RunResult(
        folder.path,
        status,
        max(one.get("steps", 0) for one in results.values()),
        {
            f"{name}/{metric}": value
            for name, one in results.items()
            for metric, value in (one.get("metrics") or {}).items()
        },
        problems=problems,
        notes=[f"{name}: {note}" for name, one in results.items() for note in one.get("notes", [])],
        trained=sum(one.get("trained", 0) for one in results.values()),
    )


def _write_report(recipe: AdaptersRecipe, results: dict[str, Any], total: RunResult) -> None:
    rows = []
    for name, own in recipe.adapters.items():
        result = results[name]
        rows.append(
            (
                f"[{name}]({name}/{REPORT})" if result.get("weights") else name,
                own.task.name,
                str(changed(own.strategy.options) or ""),
                f"`{described(own.data.train)}`",
                result.get("steps", 0),
                result.get("status", "failed"),
            )
        )
    metrics = [(*name.split("/", 1), f"{value:.4g}") for name, value in total.metrics.items()]
    lines = [
        f"# {Path(recipe.out).name}",
        "",
        f"{len(rows)} adapters of `{recipe.model}`, trained together. Each is an ordinary run in its own folder; time and memory in its report "
        "are those of all.",
        "",
        *table(("adapter", "task", "lora", "rows", "steps", "status"), rows),
        "",
        "## Results",
        "",
        *table(("adapter", "metric", "value"), metrics),
        "",
        "## Checks",
        "",
        *[f"- **problem**: {problem}" for problem in total.problems],
        *[f"- {note}" for note in total.notes],
        "",
    ]
    write_text(RunFolder(recipe.out).path / REPORT, "\n".join(lines))
