"""The charts of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from demo.compare import TITLES
from peftkit.report_page import Bar, Bars, Group, Line, Lines


def methods(runs: dict[str, Any]) -> Bars:
    """Time, memory and trained parameters of each method."""
    measures = (
        ("Seconds for one training step (shorter is better)", "step_seconds", 1.0, "{:.2f} s"),
        ("Memory that training adds to the loaded model", "peak_bytes", 2.0**20, "{:,.0f} MiB"),
        ("Trained parameters, in millions", "trainable", 1e6, "{:.1f}"),
    )
    groups = []
    for title, key, unit, form in measures:
        values = {name: run[key] / unit for name, run in runs.items()}
        bars = [Bar(TITLES[n], v, form.format(v), n == "peftkit") for n, v in values.items()]
        groups.append(Group(title, bars))
    return Bars("One step of each method", groups)


def exact_match(scores: dict[str, Any]) -> Bars:
    """Exact match of each intent after training, with the number before it as text."""
    after, before = scores["tuned"]["by_intent"], scores["base"]["by_intent"]
    bars = [
        Bar(
            intent.replace("_", " "),
            100 * value,
            f"{100 * before.get(intent, 0.0):.0f} % → {100 * value:.0f} %",
            True,
        )
        for intent, value in after.items()
    ]
    title = "Held-out requests answered exactly, before → after"
    return Bars("Exact match by kind of request", [Group(title, bars, full=100)])


def loss(steps: Sequence[dict[str, float]]) -> Lines:
    """The loss of each step."""
    numbers = list(range(1, len(steps) + 1))
    line = Line("loss", numbers, [step["loss"] for step in steps])
    return Lines("Training loss (logarithmic)", "training step", [line], logarithmic=True)


def speed(steps: Sequence[dict[str, float]]) -> Lines:
    """The tokens per second of each step."""
    numbers = list(range(1, len(steps) + 1))
    line = Line("tokens/s", numbers, [step["tokens"] / step["seconds"] for step in steps])
    return Lines("Tokens per second", "training step", [line], from_zero=True)
