"""``compare``: run strategies and simpler baselines on the same data, budget and seed, and write one report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftkit.errors import ContractError, short
from peftkit.finetune.comparison.entries import Entry, comparable, make_entries
from peftkit.finetune.comparison.report import warnings_of, write_comparison
from peftkit.finetune.comparison.source import source_values
from peftkit.finetune.comparison.worker import measure
from peftkit.finetune.reading import build_recipe, recipe_values
from peftkit.finetune.recipe import Recipe
from peftkit.finetune.run_folder import RunFolder
from peftkit.finetune.stages.recipe import StagedRecipe
from peftkit.finetune.tasks import require_task

RESULT = "compare.json"
FORGET_LIMIT = 0.1
"""Share by which the loss on the source data may rise before the report warns."""


@dataclass
class Row:
    """What one row of a comparison has found.

    Attributes:
        name: The name of the row.
        kind: ``"pretrained"``, ``"probe"``, ``"scratch"``, ``"strategy"`` or ``"stages"``.
        quality: The main metric; ``None`` if the run has none.
        metrics: Every metric.
        seconds: Time of the whole run: loading, training and evaluation.
        peak_mib: Largest memory above that before the model was loaded, in MiB; of the GPU if there is one.
        trained: Number of trained numbers.
        source_before: Loss on the source data with the pretrained model.
        source_after: The same after the run.
        problems: What the checks after training found.
        partner: The row that differs only in the stages before the last one.
    """

    name: str
    kind: str
    quality: float | None
    metrics: dict[str, float]
    seconds: float
    peak_mib: float
    trained: int
    source_before: float | None = None
    source_after: float | None = None
    problems: list[str] = field(default_factory=list)
    partner: str | None = None

    @property
    def forgotten(self) -> float | None:
        """The share by which the loss on the source data rose."""
        if self.source_before is None or self.source_after is None:
            return None
        return self.source_after / self.source_before - 1


@dataclass
class Comparison:
    """The outcome of a comparison.

    Attributes:
        folder: The folder with the report and a run for each row.
        metric: The main metric, such as ``"eval_accuracy"``.
        higher_is_better: Whether larger values of it are better.
        rows: The rows, baselines first.
        warnings: Where adaptation loses to something simpler, or forgets more than the limit.
        forget_limit: Share by which the loss on the source data may rise.
    """

    folder: Path
    metric: str
    higher_is_better: bool
    rows: list[Row]
    warnings: list[str]
    forget_limit: float

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as plain data."""
        rows = [vars(row) | {"forgotten": row.forgotten} for row in self.rows]
        return vars(self) | {"folder": str(self.folder), "rows": rows}


def compare(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    strategies: Sequence[Any] = ("full", "lora"),
    *overrides: str,
    source: Any = None,
    source_task: Any = None,
    forget_limit: float = FORGET_LIMIT,
    say: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Compare strategies with the pretrained model, a linear probe and training from scratch.

    Each row runs in a process of its own on the same rows, number of steps, batch and seed. If the pretrained model has a head for the task,
    it is evaluated as it is; otherwise its new head alone is trained (linear probe). Training from scratch uses the same architecture
    with random weights. A recipe with stages is compared with its last stage alone.

    Call it from a script only below ``if __name__ == "__main__":``, because it starts processes.

    Args:
        recipe: As for ``train``. It needs ``data.eval``; ``out`` becomes the folder of the comparison.
        strategies: Names, or mappings with ``name``, options and perhaps ``lr``. The recipe's own strategy keeps its options.
        overrides: As for ``read_recipe``.
        source: Held-out rows of the kind that the model was pretrained on, as ``data.train``; measures forgetting.
        source_task: The task whose loss is measured on ``source``. Default: the recipe's own for language models, otherwise ``masked_lm``,
            ``causal_lm`` or ``span_corruption`` by the kind of model.
        forget_limit: Share by which the loss on ``source`` may rise before there is a warning. Default: 0.1, which is 10 %.
        say: Is called with each line of progress.

    Returns:
        The rows and the warnings. The folder has ``report.md`` and ``compare.json``.

    Raises:
        ContractError: The recipe or an argument is wrong, or a run failed.
    """
    if not forget_limit >= 0:
        raise ContractError(
            f"forget_limit={forget_limit!r} is negative; use a share such as {FORGET_LIMIT}"
        )
    if source is None and source_task is not None:
        raise ContractError(
            f"source_task={short(source_task)} without source; name rows of the source data, or remove it"
        )
    values = recipe_values(recipe, overrides)
    checked = comparable(values)
    own = checked.as_first(-1) if isinstance(checked, StagedRecipe) else checked
    metric, higher = _main_metric(own)
    folder = RunFolder(checked.out)
    folder.require_free()
    entries = make_entries(values, strategies)
    measured = None
    if source is not None:
        measured = source_values(own, source, source_task)
        build_recipe(measured)
    rows = _measured(entries, measured, metric, say)
    warnings = warnings_of(rows, metric, higher, forget_limit)
    found = Comparison(folder.path, metric, higher, rows, warnings, forget_limit)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_json(RESULT, found.to_dict())
    write_comparison(found, own)
    say(f"written to {folder.path}")
    return found


def _main_metric(recipe: Recipe) -> tuple[str, bool]:
    """The name of the metric by which rows are compared, and whether larger is better."""
    chosen = recipe.training.best_metric
    name = require_task(recipe.task.name).best_metric if chosen in (None, "last") else chosen
    return f"eval_{name}", name != "loss"


def _measured(
    entries: list[Entry],
    source: Mapping[str, Any] | None,
    metric: str,
    say: Callable[[str], None],
) -> list[Row]:
    """Run the entries one after the other; the probe only if the pretrained model has no head."""
    rows, needs_probe = [], False
    for entry in entries:
        if entry.kind == "probe" and not needs_probe:
            continue
        say(f"{entry.name} ...")
        found = measure(entry, source)
        if "new_head" in found:
            needs_probe = True
            say("the head is new, so it is trained alone instead (linear probe)")
            continue
        row = Row(
            entry.name, entry.kind, found["metrics"].get(metric), **found, partner=entry.partner
        )
        rows.append(row)
        quality = "no value" if row.quality is None else f"{row.quality:.4g}"
        say(f"{entry.name}: {metric.removeprefix('eval_')} {quality} in {row.seconds:.0f} s")
    return rows
