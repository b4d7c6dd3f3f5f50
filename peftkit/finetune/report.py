"""``report.md`` and ``report.html``: the run on one page."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

from peftkit.finetune.recipe import Recipe, batch_text, changed, described
from peftkit.finetune.result import RunResult, Usage
from peftkit.finetune.run_folder import PAGE, RECIPE, REPORT, RunFolder, write_text
from peftkit.finetune.run_page import Run, memory_text, run_page
from peftkit.finetune.tasks import require_task
from peftkit.report_page.machine import machine_facts

_ROWS = 20
_BARS = "▁▂▃▄▅▆▇█"


def write_report(
    recipe: Recipe,
    model: Any,
    folder: RunFolder,
    result: RunResult,
    facts: dict[str, Any],
    history: list[dict[str, Any]],
    samples: list[dict[str, str]],
    usage: Usage,
) -> None:
    """Write the report of a finished run as text and tables."""
    trained = result.trained
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
                ("strategy", _strategy(recipe)),
                *_teacher(recipe),
                ("trained numbers", f"{trained:,} of {total:,} ({trained / total:.2%})"),
                ("steps", str(result.steps)),
                (
                    "learning rate",
                    f"{training.lr:g} (new head {training.head_lr:g}), {training.scheduler}",
                ),
                ("batch", batch_text(training, facts)),
                ("weights", f"`{result.weights.name}/`" if result.weights else "none"),
                ("memory", memory_text(usage.plan, usage.measured_bytes) or "not known"),
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


def write_run_page(
    recipe: Recipe,
    folder: RunFolder,
    result: RunResult,
    history: list[dict[str, Any]],
    samples: list[dict[str, str]],
    usage: Usage,
) -> None:
    """Write the report of a finished run as a page with curves."""
    path, training = folder.path, recipe.training
    run = Run(
        title=path.name,
        lead=f"{recipe.model}, {recipe.task.name}, {recipe.strategy.name}: {result.trained:,} trained numbers, {result.steps} steps.",
        history=history,
        settings=[
            ("model", recipe.model),
            ("strategy", _strategy(recipe)),
            ("learning rate", f"{training.lr:g}, {training.scheduler}"),
            ("batch", f"{training.batch_size} x {training.gradient_accumulation}"),
            ("seed", str(training.seed)),
            *((name, f"{value:.4g}") for name, value in result.metrics.items()),
        ],
        machine=machine_facts(),
        samples=samples,
        notes=result.notes,
        problems=result.problems,
        seconds=usage.seconds,
        measured_bytes=usage.measured_bytes,
        plan=usage.plan,
        commands=[
            (
                "Repeat the run in another folder:",
                shlex.join(["peftkit", "train", str(path / RECIPE), f"out={path}-2"]),
            ),
            _use(recipe, path),
        ],
    )
    write_text(path / PAGE, run_page(run))


def _use(recipe: Recipe, path: Path) -> tuple[str, str]:
    task = require_task(recipe.task.name)
    if task.generative:
        asked = ["--audio", "recording.wav"] if task.answers_audio else ["a prompt"]
        return "Use it:", shlex.join(["peftkit", "generate", str(path), *asked])
    return "Evaluate it on other rows:", shlex.join(
        ["peftkit", "eval", str(path), "--data", "data.jsonl"]
    )


def _strategy(recipe: Recipe) -> str:
    return f"{recipe.strategy.name} {changed(recipe.strategy.options) or ''}".strip()


def _teacher(recipe: Recipe) -> list[tuple[str, str]]:
    """The row of the table for the teacher, if there is one."""
    if recipe.distill is None:
        return []
    options = {n: v for n, v in changed(recipe.distill).items() if n != "teacher"}
    return [("teacher", f"`{recipe.distill.teacher}` {options or ''}".strip())]


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
        if name in ("loss", "label_loss", "teacher_loss", "grad_norm", "learning_rate")
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
    """A curve as one line of text, with a ``?`` for a value that is not finite."""
    if len(values) > width:
        values = [values[round(i * (len(values) - 1) / (width - 1))] for i in range(width)]
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span = (high - low) or 1.0
    return "".join(
        _BARS[min(7, int(8 * (value - low) / span))] if math.isfinite(value) else "?"
        for value in values
    )
