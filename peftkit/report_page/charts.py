"""The charts as data: bars, lines, and one stacked bar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar.

    Attributes:
        label: What the bar shows; written in full above the bar.
        value: Its length, at least 0.
        text: The value as text, with its unit, behind the bar.
        strong: Whether the bar has the colour of what the page is about. Other bars are grey.
    """

    label: str
    value: float
    text: str
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """Bars with one unit. Its longest bar fills the width.

    Attributes:
        title: What is measured, with the unit.
        bars: The bars, from top to bottom.
        full: The value that fills the width; by default that of the longest bar.
    """

    title: str
    bars: Sequence[Bar]
    full: float | None = None


@dataclass(frozen=True, slots=True)
class Bars:
    """Groups of horizontal bars, one below the other.

    Attributes:
        title: Title of the chart.
        groups: The groups. Each has its own scale.
    """

    title: str
    groups: Sequence[Group]


@dataclass(frozen=True, slots=True)
class Line:
    """One curve.

    Attributes:
        label: Its name in the legend.
        x: Positions, ascending.
        y: Values; those that are not finite are left out.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]

    def points(self, logarithmic: bool) -> list[tuple[float, float]]:
        """The points that can be drawn."""
        pairs = zip(self.x, self.y, strict=True)
        return [(x, y) for x, y in pairs if math.isfinite(y) and (y > 0 or not logarithmic)]


@dataclass(frozen=True, slots=True)
class Lines:
    """Curves over a common axis.

    Attributes:
        title: Title of the chart: what the vertical axis shows, with its unit.
        x_title: What the horizontal axis shows.
        lines: The curves.
        logarithmic: Whether the vertical axis is logarithmic.
        from_zero: Whether the vertical axis starts at zero.
    """

    title: str
    x_title: str
    lines: Sequence[Line]
    logarithmic: bool = False
    from_zero: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a stacked bar: its name, its size, and the size as text."""

    label: str
    value: float
    text: str


@dataclass(frozen=True, slots=True)
class Stack:
    """One stacked bar with a legend, and lines across it such as the memory of a card.

    Attributes:
        title: Title of the chart.
        parts: The parts, from left to right.
        marks: Lines across the bar.
    """

    title: str
    parts: Sequence[Part]
    marks: Sequence[Part] = ()


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from ``low`` to ``high``: multiples of 1, 2 or 5 times a power of ten, about ``count`` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from ``low`` to ``high``, with 2 and 5 times a power if there are fewer than three."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        found = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(found) >= 3:
            return found
    return found or [low, high]


def number(value: float) -> str:
    """A number of an axis, short: ``"1,200"``, ``"0.05"``."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
