"""The report of a sweep: one table, the best run, and how to use it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from peftkit.finetune.recipe import Recipe, described
from peftkit.finetune.report import table
from peftkit.finetune.run_folder import REPORT, write_text
from peftkit.finetune.tasks import require_task

if TYPE_CHECKING:
    from peftkit.finetune.together.sweeping import Sweep, SweepRow


def write_sweep_report(found: Sweep, recipe: Recipe) -> None:
    """Write ``report.md`` in the folder of a sweep.

    Args:
        found: The outcome.
        recipe: The recipe of one of the runs.
    """
    metric = found.metric.removeprefix("eval_")
    varied = list(found.rows[0].values)
    names = [name.rpartition(".")[2] for name in varied]
    order = "larger is better" if found.higher_is_better else "smaller is better"
    columns = [
        "",
        *names,
        metric,
        *(["loss"] if metric != "loss" else []),
        "train loss",
        "steps",
        "status",
    ]
    lines = [
        f"# {found.folder.name}",
        "",
        f"`{recipe.model}` on the task {recipe.task.name}: {described(recipe.data.train)}, {len(found.rows)} adapters trained on one frozen model, "
        f"batches of {recipe.training.batch_size} x {recipe.training.gradient_accumulation} rows each, seed {recipe.training.seed}. "
        f"{metric}: {order}.",
        "",
        *table(tuple(columns), [_cells(row, varied, metric) for row in found.rows]),
        "",
        *_best(found, recipe),
        "`dropped` runs were stopped early, because others were better; `peftkit train FOLDER/recipe.yaml resume=true` trains one to its end.",
        "Each row is an ordinary run: its folder has its recipe, its curves and its checks.",
        "",
        "One seed says little about small differences; repeat the sweep with other values of training.seed.",
        "",
    ]
    problems = [f"- **{row.name}**: {problem}" for row in found.rows for problem in row.problems]
    if problems:
        lines += ["## Problems", "", *problems, ""]
    write_text(found.folder / REPORT, "\n".join(lines))


def _best(found: Sweep, recipe: Recipe) -> list[str]:
    if found.best is None:
        return [
            "There is no best run, because no run was evaluated; add data.eval to the recipe."
            if recipe.data.eval is None
            else "There is no best run, because none was finished.",
            "",
        ]
    place = str(found.folder / found.best)
    use = ["peftkit", "eval", place, "--data", "data.jsonl"]
    if require_task(recipe.task.name).generative:
        use = ["peftkit", "generate", place, "a prompt"]
    return [f"The best run is **{found.best}**. Use it:", "", f"    {shlex.join(use)}", ""]


def _cells(row: SweepRow, varied: list[str], metric: str) -> tuple[Any, ...]:
    values = [_number(row.values[name]) for name in varied]
    loss = [_number(row.metrics.get("eval_loss"))] if metric != "loss" else []
    train = _number(row.metrics.get("train_loss"))
    return (row.name, *values, _number(row.quality), *loss, train, row.steps, row.status)


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
