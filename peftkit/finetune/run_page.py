"""A finished or running training as one HTML page: result, curves, memory, answers, settings and machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peftkit.planning.result import MemoryPlan, size_text
from peftkit.report_page import (
    Line,
    Lines,
    Tile,
    bullets,
    command,
    figure,
    figures,
    page,
    paragraph,
    section,
    table,
    tiles,
)

_TITLES = {
    "loss": "Training loss",
    "eval_loss": "Evaluation loss",
    "grad_norm": "Norm of the gradients",
    "learning_rate": "Learning rate",
    "mean_token_accuracy": "Accuracy of the next token",
}
_LEFT_OUT = ("epoch", "step", "total_flos", "num_tokens", "num_input_tokens_seen")
_RATES = ("_runtime", "_per_second", "_time")
_LAST = 10


@dataclass
class Run:
    """What the page shows.

    Attributes:
        title: Title of the page.
        lead: A sentence below it.
        history: The Trainer's log.
        settings: Names and values.
        machine: Facts about the machine, by name.
        samples: Answers: ``prompt``, ``before``, ``after`` and, if it is known, ``expected``.
        notes: What is worth knowing, such as which layers are fused.
        problems: What is wrong.
        seconds: Time of the training.
        step_seconds: The median of the steps.
        measured_bytes: The most memory that training added to the loaded model; ``None`` if it was not measured.
        plan: The plan of a step.
        finished: Whether the training is finished.
        commands: Commands to copy: the words before each, and the command.
    """

    title: str
    lead: str = ""
    history: Sequence[dict[str, Any]] = ()
    settings: Sequence[tuple[str, Any]] = ()
    machine: dict[str, str] = field(default_factory=dict)
    samples: Sequence[dict[str, str]] = ()
    notes: Sequence[str] = ()
    problems: Sequence[str] = ()
    seconds: float = 0.0
    step_seconds: float | None = None
    measured_bytes: int | None = None
    plan: MemoryPlan | None = None
    finished: bool = True
    commands: Sequence[tuple[str, str]] = ()


def run_page(run: Run) -> str:
    """The page as HTML."""
    curves = _curves(run.history)
    parts = [
        tiles(_headline(run, curves)),
        "" if run.finished else paragraph("The training is still running, or it was stopped."),
        section("Problems", bullets(run.problems)) if run.problems else "",
        section("Curves", figures(*(figure(chart) for chart in curves.values()))) if curves else "",
        _samples(run.samples),
        _memory(run),
        section("Repeat and use it", *_commands(run.commands)) if run.commands else "",
        section("Settings", table(["", ""], run.settings, words=True)) if run.settings else "",
        section("Notes", bullets(run.notes)) if run.notes else "",
        section("Machine and versions", table(["", ""], list(run.machine.items()), words=True))
        if run.machine
        else "",
    ]
    return page(run.title, *parts, lead=run.lead)


def memory_text(plan: MemoryPlan | None, measured_bytes: int | None) -> str | None:
    """Planned and measured memory of a step in one sentence; ``None`` if neither is known."""
    planned = None if plan is None else size_text(plan.peak_bytes - plan.loaded_bytes)
    measured = None if measured_bytes is None else size_text(measured_bytes)
    if planned is None and measured is None:
        return None
    found = [f"planned {planned}" if planned else "", f"measured {measured}" if measured else ""]
    return f"memory that training adds to the loaded model: {', '.join(filter(None, found))}"


def _curves(history: Sequence[dict[str, Any]]) -> dict[str, Lines]:
    """The curves of the numbers that were logged more than once, by name. The evaluation loss shares a chart with the loss."""
    values: dict[str, tuple[list[float], list[float]]] = {}
    for entry in history:
        for name, value in entry.items():
            if name in _LEFT_OUT or name.endswith(_RATES) or name.startswith(("train_", "final_")):
                continue
            if isinstance(value, (int, float)) and "step" in entry:
                x, y = values.setdefault(name, ([], []))
                x.append(entry["step"])
                y.append(float(value))
    charts = {}
    for name, (x, y) in values.items():
        lines = [Line(_title(name), x, y)]
        if name == "eval_loss" and "loss" in values:
            continue
        if name == "loss" and "eval_loss" in values:
            lines.append(Line(_title("eval_loss"), *values["eval_loss"]))
        if max(len(line.x) for line in lines) > 1:
            charts[name] = Lines(_title(name), "training step", lines)
    order = ("loss", *(n for n in charts if n not in ("loss", "learning_rate")), "learning_rate")
    return {name: charts[name] for name in order if name in charts}


def _title(name: str) -> str:
    if name in _TITLES:
        return _TITLES[name]
    plain = name.removeprefix("eval_").replace("_", " ")
    return f"{plain} in the evaluation" if name.startswith("eval_") else plain


def _headline(run: Run, curves: dict[str, Lines]) -> list[Tile]:
    found = []
    if "loss" in curves:
        for line in curves["loss"].lines:
            y = [value for value in line.y if math.isfinite(value)]
            if len(y) > 1:
                last = y[-_LAST:] if line is curves["loss"].lines[0] else y[-1:]
                end = sum(last) / len(last)
                words = f"{line.label.lower()}, at the start → at the end"
                found.append(Tile(f"{y[0]:.3g} → {end:.3g}", words, wide=not found))
    if run.seconds:
        found.append(Tile(_time(run.seconds), "of training"))
    if run.step_seconds:
        found.append(Tile(f"{run.step_seconds:.2f} s", "for one step (median)"))
    if run.measured_bytes is not None:
        planned = run.plan and size_text(run.plan.peak_bytes - run.plan.loaded_bytes)
        words = "memory that training added to the loaded model"
        found.append(
            Tile(
                size_text(run.measured_bytes), f"{words}; planned: {planned}" if planned else words
            )
        )
    if run.problems:
        found.insert(0, Tile(str(len(run.problems)), "problems, listed below"))
    return found


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _samples(samples: Sequence[dict[str, str]]) -> str:
    if not samples:
        return ""
    names = [n for n in ("prompt", "before", "after", "expected") if any(n in s for s in samples)]
    heads = {"before": "before training", "after": "after training"}
    rows = [[sample.get(name, "") for name in names] for sample in samples]
    return section("Answers", table([heads.get(n, n) for n in names], rows, words=True))


def _memory(run: Run) -> str:
    text = memory_text(run.plan, run.measured_bytes)
    if text is None:
        return ""
    parts = [paragraph(f"{text[0].upper()}{text[1:]}.")]
    if run.plan is not None:
        parts.append(figure(run.plan.chart(), "The plan of one step, with the loaded model."))
        if run.measured_bytes is not None:
            parts.append(
                paragraph(
                    "The plan is that of a batch of the longest rows. Measured on the CPU is the memory of the process, which counts the "
                    "allocator's free space and generated code too; on a GPU it is what torch allocates.",
                    note=True,
                )
            )
    return section("Memory", *parts)


def _commands(commands: Sequence[tuple[str, str]]) -> list[str]:
    return [part for words, text in commands for part in (paragraph(words), command(text))]
