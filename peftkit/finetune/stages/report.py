"""The report of a run with stages: one page for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftkit.finetune.recipe import changed, described
from peftkit.finetune.report import table
from peftkit.finetune.run_folder import REPORT, write_text
from peftkit.finetune.stages.recipe import StagedRecipe

_CARRIED = {
    None: "the model as it was loaded",
    "adapter": "the adapter of the stage before",
    "merge": "the model with the adapter of the stage before merged",
    "weights": "the weights of the stage before",
}


def write_stages_report(recipe: StagedRecipe, results: list[Any], total: Any) -> None:
    """Write ``report.md`` in the folder of a run.

    Args:
        recipe: The recipe.
        results: The results of the stages that were trained, in order.
        total: The result of the run.
    """
    out = Path(recipe.out)
    rows = []
    for number, stage in enumerate(recipe.stages, start=1):
        own = stage.recipe
        result = results[number - 1] if number <= len(results) else None
        folder = Path(own.out).name
        rows.append(
            (
                f"[{folder}]({folder}/{REPORT})" if result and result.weights else folder,
                f"{own.strategy.name} {changed(own.strategy.options) or ''}".strip(),
                _CARRIED[stage.carry],
                f"`{described(own.data.train)}`",
                "" if result is None else str(result.steps),
                "not started" if result is None else result.status,
            )
        )
    lines = [
        f"# {out.name}",
        "",
        *table(("", ""), [("model", f"`{recipe.model}`"), ("status", total.status)]),
        "",
        "## Stages",
        "",
        *table(("stage", "strategy", "starts from", "rows", "steps", "status"), rows),
        "",
        "## Results",
        "",
        *table(
            ("stage", "metric", "value"),
            [
                (Path(result.folder).name, name, f"{value:.4g}")
                for result in results
                for name, value in result.metrics.items()
            ],
        ),
        "",
        "## Checks",
        "",
        *[f"- **problem**: {problem}" for problem in total.problems],
        *[f"- {note}" for note in total.notes],
        "",
    ]
    if total.weights is not None:
        lines += [f"The weights are in `{total.weights.relative_to(out)}/`.", ""]
    write_text(out / REPORT, "\n".join(lines))
