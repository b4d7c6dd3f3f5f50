"""``report.md``: the run on one page, as text and tables."""

from __future__ import annotations

from typing import Any

from peftkit.finetune.recipe import Recipe, changed, described
from peftkit.finetune.run_folder import REPORT, RunFolder, write_text

_ROWS = 20
_BARS = "▁▂▃▄▅▆▇█"


def write_report(
    recipe: Recipe,
    model: Any,
    folder: RunFolder,
    result: Any,
    facts: dict[str, Any],
    history: list[dict[str, Any]],
    samples: list[dict[str, str]],
    memory: str | None = None,
) -> None:
    """Write the report of a finished run. ``memory`` is a sentence about planned and measured memory."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    training = recipe.training
    lines = [
        f"# {folder.path.name}",
        "",
        *table(
            ("", ""),
            [
                ("model", f"`{recipe.model}`"),
                ("task", recipe.task.name),
                (
                    "strategy",
                    f"{recipe.strategy.name} {changed(recipe.strategy.options) or ''}".strip(),
                ),
                ("trained numbers", f"{trained:,} of {total:,} ({trained / total:.2%})"),
                ("steps", str(result.steps)),
                (
                    "learning rate",
                    f"{training.lr:g} (new head {training.head_lr:g}), {training.scheduler}",
                ),
                ("batch", f"{training.batch_size} x {training.gradient_accumulation}"),
                ("weights", f"`{result.weights.name}/`"),
                ("memory", memory or "not known"),
            ],
        ),
        "",
        "## Checks",
        "",
        *[f"- **problem**: {problem}" for problem in result.problems],
        *[f"- {note}" for note in result.notes],
        "",
        "## Data",
        "",
        *table(
            ("", "train", "eval"),
            [
                (name, *(_cell(facts[part], name) for part in ("train", "eval")))
                for name in (
                    "read",
                    "used",
                    "bad",
                    "truncated",
                    "masked",
                    "samples",
                    "tokens",
                    "supervised",
                )
            ],
        ),
        "",
        f"Training rows from `{described(recipe.data.train)}`, evaluation rows from `{described(recipe.data.eval)}`. `masked` counts rows "
        "of which no label was left.",
        "",
    ]
    for part in ("train", "eval"):
        lines += [f"- skipped ({part}): {line}" for line in (facts[part] or {}).get("bad_rows", [])]
    lines += [
        "",
        "## Results",
        "",
        *table(("metric", "value"), [(n, f"{v:.4g}") for n, v in result.metrics.items()]),
        "",
    ]
    lines += _curves(history)
    if samples:
        lines += ["## Samples", ""]
        for sample in samples:
            for name in ("prompt", "expected", "before", "after"):
                lines += [f"**{name}**", "", *_quoted(sample.get(name, "")), ""]
            lines += ["---", ""]
    write_text(folder.path / REPORT, "\n".join(lines))


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows),
    ]


def _cell(counts: dict[str, Any] | None, name: str) -> str:
    return "" if counts is None else f"{counts[name]:,}"


def _quoted(text: str) -> list[str]:
    return [f"> {line}" for line in text.splitlines()] or ["> (nothing)"]


def _curves(history: list[dict[str, Any]]) -> list[str]:
    """A line of bars for each metric, and a table with at most 20 rows."""
    steps = [
        entry for entry in history if "loss" in entry or any(n.startswith("eval_") for n in entry)
    ]
    names = [
        name
        for name in dict.fromkeys(name for entry in steps for name in entry)
        if name in ("loss", "grad_norm", "learning_rate")
        or (name.startswith("eval_") and not name.endswith(("runtime", "per_second")))
    ]
    if not steps:
        return []
    merged: dict[int, dict[str, Any]] = {}
    for entry in steps:
        merged.setdefault(entry["step"], {}).update(entry)
    lines = ["## Curves", ""]
    for name in names:
        values = [row[name] for row in merged.values() if isinstance(row.get(name), (int, float))]
        if len(values) > 1 and name != "learning_rate":
            lines.append(f"- {name}: `{bars(values)}` from {values[0]:.4g} to {values[-1]:.4g}")
    shown = list(merged)
    if len(shown) > _ROWS:
        shown = [shown[round(i * (len(shown) - 1) / (_ROWS - 1))] for i in range(_ROWS)]
    cells = [
        (step, *(f"{merged[step][n]:.4g}" if n in merged[step] else "" for n in names))
        for step in shown
    ]
    return [*lines, "", *table(("step", *names), cells), ""]


def bars(values: list[float], width: int = 40) -> str:
    """A curve as one line of text."""
    if len(values) > width:
        values = [values[round(i * (len(values) - 1) / (width - 1))] for i in range(width)]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(_BARS[min(7, int(8 * (value - low) / span))] for value in values)
