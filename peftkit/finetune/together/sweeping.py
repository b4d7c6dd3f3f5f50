"""``sweep``: adapters with different options, trained on one frozen model, and a table of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftkit.errors import ContractError, listing
from peftkit.finetune.reading import recipe_values
from peftkit.finetune.recipe import Recipe
from peftkit.finetune.run_folder import RESULT, RunFolder
from peftkit.finetune.run_lock import RunLock, removed_if_unused
from peftkit.finetune.tasks import require_task
from peftkit.finetune.together.halving import DROPPED, Halving
from peftkit.finetune.together.member import Extra, Shared
from peftkit.finetune.together.over import Variant, read_over, variants
from peftkit.finetune.together.running import require_together, resumable, train_together

SWEEP = "sweep.json"
_ENDED = ("finished", "dropped")


@dataclass
class SweepRow:
    """One run of a sweep.

    Attributes:
        name: The name of the run and of its folder.
        values: The keys that vary, with its values.
        status: ``"finished"``, ``"dropped"`` (stopped early, because others were better), ``"failed"`` or ``"stopped"``.
        quality: The main metric; ``None`` if there is none.
        metrics: Every metric.
        steps: Optimiser steps that were done.
        folder: The folder of the run, which ``peftkit generate`` and ``peftkit eval`` take if it is finished.
        problems: What the checks after training found, or why the run failed.
    """

    name: str
    values: dict[str, Any]
    status: str
    quality: float | None
    metrics: dict[str, float]
    steps: int
    folder: Path
    problems: list[str] = field(default_factory=list)


@dataclass
class Sweep:
    """The outcome of a sweep.

    Attributes:
        folder: The folder with the report and a run for each row.
        metric: The main metric, such as ``"eval_loss"``.
        higher_is_better: Whether larger values of it are better.
        rows: The runs, the best first.
        best: Name of the best finished run; ``None`` without an evaluation.
    """

    folder: Path
    metric: str
    higher_is_better: bool
    rows: list[SweepRow]
    best: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as plain data."""
        rows = [vars(row) | {"folder": str(row.folder)} for row in self.rows]
        return vars(self) | {"folder": str(self.folder), "rows": rows}


def sweep(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    over: Mapping[str, Iterable[Any]] | Iterable[str],
    *overrides: str,
    keep_best: int | None = None,
    after: float = 0.3,
    say: Callable[[str], None] = lambda line: None,
) -> Sweep:
    """Train LoRA adapters with different options on one frozen model.

    On a GPU a step with at most 1024 tokens computes the same rows for all adapters in one batch; otherwise the runs take turns. Each adapter
    has its own loss, gradient norm, optimiser, schedule, evaluation and checkpoints, as in a run of its own, and ends with the weights of that
    run: to the bit by turns, up to rounding with joint steps, in which dropout draws other numbers.

    Args:
        recipe: As for ``train``, with strategy ``lora``; ``out`` becomes the folder of the sweep.
        over: The keys that vary and their values: ``{"strategy.r": [4, 8], "training.lr": [1e-4, 3e-4]}``, or texts such as
            ``"strategy.r=4,8"``. All combinations are trained.
        overrides: As for ``read_recipe``. ``"resume=true"`` continues a sweep that was stopped.
        keep_best: Keep so many runs after the share ``after`` of the steps, by their evaluation loss, and drop the others with a
            checkpoint. Later steps have fewer rows. Source: Jamieson and Talwalkar, 2016, arXiv:1502.07943 (successive halving).
        after: Share of the steps before that.
        say: Is called with each line of progress.

    Returns:
        The runs. The folder has ``report.md``, ``sweep.json``, and the folder of each run.

    Raises:
        ContractError: An argument, the recipe, the data or the model cannot be used; the rows of a batch are not independent in this
            model; or every run failed.
    """
    values = recipe_values(recipe, overrides)
    varied = read_over(over)
    found = variants(values, varied)
    recipe_of_all = found[0].recipe
    _check(found, keep_best, after)
    folder = RunFolder(Path(recipe_of_all.out).parent)
    if recipe_of_all.resume:
        _require_same_names(folder, found)
    else:
        _require_free(folder)
    with closing(RunLock(folder.path, say)) as lock, removed_if_unused(folder, lock):
        if recipe_of_all.resume:
            lock.take()
        errors = _train(found, folder, lock, keep_best, after, say)
        result = _collected(found, folder, errors)
        folder.write_json(SWEEP, result.to_dict() | {"over": varied})
        _write_report(result, recipe_of_all)
    say(f"written to {folder.path}")
    if all(row.status == "failed" for row in result.rows):
        raise ContractError(
            f"every run of the sweep failed; the first: {result.rows[0].problems[0]}"
        )
    return result


def _check(found: list[Variant], keep_best: int | None, after: float) -> None:
    """Raise ``ContractError`` unless these runs can be trained together."""
    recipe = found[0].recipe
    require_together({variant.name: variant.recipe for variant in found})
    if keep_best is None:
        return
    if not 1 <= keep_best < len(found):
        raise ContractError(
            f"keep_best={keep_best} of {len(found)} runs; use a number from 1 to {len(found) - 1}"
        )
    if not 0 < after < 1:
        raise ContractError(f"after={after} is no share of the steps; use a number such as 0.3")
    if recipe.data.eval is None:
        raise ContractError(
            f"keep_best={keep_best} needs an evaluation; add data.eval, such as data.eval=0.1"
        )


def _require_free(folder: RunFolder) -> None:
    if (folder.path / SWEEP).exists():
        raise ContractError(
            f"out={str(folder.path)!r} already has a sweep; continue it with resume=true, or name another folder: out={folder.path}-2"
        )
    folder.require_free()


def _require_same_names(folder: RunFolder, found: list[Variant]) -> None:
    known = folder.read_json(SWEEP)
    if known is None:
        raise ContractError(
            f"resume=true, but out={str(folder.path)!r} has no sweep (no {SWEEP}); remove resume=true to start one"
        )
    before, now = {row["name"] for row in known["rows"]}, {variant.name for variant in found}
    if before != now:
        raise ContractError(
            f"resume=true, but the sweep in {folder.path} has other runs:\n{listing(sorted(before ^ now), 8)}\nUse the same values of over, "
            "or start a new sweep in another folder."
        )


def _train(
    found: list[Variant],
    folder: RunFolder,
    lock: RunLock,
    keep_best: int | None,
    after: float,
    say: Callable[[str], None],
) -> dict[str, str]:
    """Train the runs that are not at their ends; returns the errors of those that failed."""
    shared = Shared(same_rows=True)

    def halving(name: str) -> Extra:
        def make(trainer: Any, stopper: Any) -> list[Any]:
            if keep_best is None:
                return []
            return [Halving(trainer, stopper, name, keep_best, after, shared.conductor, folder)]

        return make

    def started() -> None:
        folder.path.mkdir(parents=True, exist_ok=True)
        if not lock.is_taken:
            lock.take()
            _require_free(folder)  # another sweep may have started during the checks
        rows = [{"name": variant.name, "values": variant.values} for variant in found]
        folder.write_json(SWEEP, {"status": "running", "rows": rows})

    shared.on_ready = started
    left = {}
    for variant in found:
        if _result(variant).get("status") not in _ENDED:
            own = resumable(variant.recipe)
            left[variant.name] = own, halving(variant.name)
    return train_together(left, shared, say)


def _result(variant: Variant) -> dict[str, Any]:
    return RunFolder(variant.recipe.out).read_json(RESULT) or {}


def _collected(found: list[Variant], folder: RunFolder, errors: dict[str, str]) -> Sweep:
    recipe = found[0].recipe
    task = require_task(recipe.task.name)
    chosen = recipe.training.best_metric
    name = task.best_metric if chosen in (None, "last") else chosen
    higher = name not in task.lower_is_better
    metric = f"eval_{name}"
    rows, dropped = [], folder.read_json(DROPPED) or {}
    for variant in found:
        written = _result(variant)
        error = errors.get(variant.name)
        metrics = written.get("metrics") or {}
        if written.get("status") == "dropped":
            metrics = {"eval_loss": dropped[variant.name]}
        rows.append(
            SweepRow(
                variant.name,
                variant.values,
                "failed" if error else written.get("status", "failed"),
                metrics.get(metric),
                metrics,
                written.get("steps", 0),
                Path(variant.recipe.out),
                [error] if error else written.get("problems") or [],
            )
        )
    rows.sort(key=lambda row: _rank(row, higher))
    first = rows[0]
    best = first.name if first.status == "finished" and first.quality is not None else None
    return Sweep(folder.path, metric, higher, rows, best)


def _rank(row: SweepRow, higher: bool) -> tuple[Any, ...]:
    quality = row.quality
    known = quality is not None and quality == quality
    value = (-quality if higher else quality) if known and quality is not None else 0.0
    return (row.status != "finished" or bool(row.problems), not known, -row.steps, value)


def _write_report(found: Sweep, recipe: Recipe) -> None:
    from peftkit.finetune.together.report import write_sweep_report

    write_sweep_report(found, recipe)
