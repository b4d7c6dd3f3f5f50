"""The report of a comparison: one table, and what it means in plain words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftkit.finetune.recipe import Recipe, described
from peftkit.finetune.report import table
from peftkit.finetune.run_folder import REPORT, write_text

if TYPE_CHECKING:
    from peftkit.finetune.comparison.comparing import Comparison, Row

_SIMPLER = {
    "pretrained": "the pretrained model as it is",
    "probe": "a linear probe (the head alone)",
    "scratch": "training the same architecture from scratch",
}


def warnings_of(rows: list[Row], metric: str, higher: bool, forget_limit: float) -> list[str]:
    """Say in plain words where adaptation loses to something simpler, or forgets.

    Args:
        rows: The rows.
        metric: The main metric.
        higher: Whether larger values of it are better.
        forget_limit: Share by which the loss on the source data may rise.
    """
    by_name = {row.name: row for row in rows}
    name = metric.removeprefix("eval_")
    found = []
    for row in rows:
        if row.kind in _SIMPLER:
            continue
        for other in rows:
            if other.kind in _SIMPLER and _loses(row, other, higher):
                found.append(
                    f"{row.name} loses to {_SIMPLER[other.kind]}: {name} {row.quality:.4g} against {other.quality:.4g}. "
                    + _advice(other.kind)
                )
        alone = by_name.get(row.partner or "")
        if alone is not None and _loses(row, alone, higher):
            found.append(
                f"{row.name} loses to {alone.name}, which leaves out the stages before the last: {name} {row.quality:.4g} against "
                f"{alone.quality:.4g}. The first stages did harm (negative transfer); leave them out, or use texts nearer to the task."
            )
        if row.forgotten is not None and row.forgotten > forget_limit:
            found.append(
                f"{row.name} forgets: the loss on the source data rose by {row.forgotten:.1%}, from {row.source_before:.4g} to "
                f"{row.source_after:.4g}, and the limit is {forget_limit:.0%}. Use a smaller learning rate, fewer steps or an adapter, or mix "
                "source data into the training rows."
            )
        found += [f"{row.name}: {problem}" for problem in row.problems]
    return found


def _loses(row: Row, other: Row, higher: bool) -> bool:
    if row.quality is None or other.quality is None:
        return False
    return row.quality < other.quality if higher else row.quality > other.quality


def _advice(kind: str) -> str:
    if kind == "scratch":
        return "The pretraining does not help here (negative transfer); use another model, or train from scratch."
    if kind == "probe":
        return "The adaptation spoils the features; use a smaller learning rate, fewer steps, or the probe."
    return (
        "The adaptation does harm; use a smaller learning rate, other data, or the model as it is."
    )


def write_comparison(found: Comparison, recipe: Recipe) -> None:
    """Write ``report.md`` in the folder of a comparison.

    Args:
        found: The outcome.
        recipe: The recipe that was compared; of stages, the last one.
    """
    training = recipe.training
    length = (
        f"{training.max_steps} steps"
        if training.max_steps
        else f"{training.epochs or 'the default number of'} epochs"
    )
    with_source = any(row.source_before is not None for row in found.rows)
    order = "larger is better" if found.higher_is_better else "smaller is better"
    head = [
        "",
        found.metric.removeprefix("eval_"),
        "loss",
        "seconds",
        "peak MiB",
        "trained numbers",
    ]
    head += ["source before", "source after", "rise"] if with_source else []
    lines = [
        f"# {found.folder.name}",
        "",
        f"`{recipe.model}` on the task {recipe.task.name}: {described(recipe.data.train)}, {length}, batches of {training.batch_size} x "
        f"{training.gradient_accumulation}, seed {training.seed}, the same for each row. {found.metric.removeprefix('eval_')}: {order}.",
        "",
        *table(tuple(head), [_cells(row, with_source) for row in found.rows]),
        "",
        "`pretrained` is the model without training, `probe` trains a new head alone, `scratch` trains random weights. `stages, X` is the "
        "whole recipe and `X` its last stage alone. Seconds are those of the whole run, memory is above that before the model was loaded.",
        "",
        "## Warnings",
        "",
        *([f"- **{line}**" for line in found.warnings] or ["None: no strategy loses to a simpler row."]),
        "",
        "One seed says little about small differences; repeat the comparison with other values of training.seed.",
        "",
    ]  # fmt: skip
    write_text(found.folder / REPORT, "\n".join(lines))


def _cells(row: Row, with_source: bool) -> tuple[Any, ...]:
    cells = [
        row.name,
        _number(row.quality),
        _number(row.metrics.get("eval_loss")),
        f"{row.seconds:.1f}",
        _number(row.peak_mib),
        f"{row.trained:,}",
    ]
    if with_source:
        rise = "" if row.forgotten is None else f"{row.forgotten:+.1%}"
        cells += [_number(row.source_before), _number(row.source_after), rise]
    return tuple(cells)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
