"""Draw charts as SVG. The drawing area is 420 units wide, so that its text is readable on a phone and does not grow too large elsewhere."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from html import escape

from peftkit.report_page.charts import Bars, Lines, Stack, log_ticks, number, ticks
from peftkit.report_page.style import CHART, COLOURS, THEMES

_WIDTH = 420
_LETTER = 6.6
"""Width of an average letter of the text."""
_BOLD_LETTER = 7.4
_MOST_POINTS = 400


def to_svg(chart: Bars | Lines | Stack, *, file: bool = False) -> str:
    """Draw a chart.

    Args:
        chart: The chart.
        file: Whether the SVG is a file of its own, which needs its own colours. In a page it uses those of the page.
    """
    if isinstance(chart, Bars):
        height, body = _bars(chart)
    elif isinstance(chart, Lines):
        height, body = _lines(chart)
    else:
        height, body = _stack(chart)
    space, style = "", ""
    if file:
        space = ' xmlns="http://www.w3.org/2000/svg"'
        style = f"<style>{THEMES}{CHART} svg.chart {{ background: var(--page); }}</style>"
    title = escape(chart.title)
    return (
        f'<svg{space} class="chart" role="img" aria-label="{title}" viewBox="0 0 {_WIDTH} {height:g}">'
        f"<title>{title}</title>{style}{''.join(body)}</svg>"
    )


def _bars(chart: Bars) -> tuple[float, list[str]]:
    body, y = _title(chart.title)
    for group in chart.groups:
        y += 20
        body.append(_text(0, y, group.title, "soft"))
        y += 8
        longest = group.full or max((bar.value for bar in group.bars), default=0) or 1.0
        room = _WIDTH - 8 - max((_LETTER * len(bar.text) for bar in group.bars), default=0)
        for bar in group.bars:
            width = max(1.0, room * min(bar.value / longest, 1.0))
            body.append(_text(0, y + 13, bar.label))
            kind = "f0" if bar.strong else "other"
            body.append(
                f'<rect class="{kind}" x="0" y="{y + 18:g}" width="{width:.1f}" height="12" rx="2"/>'
            )
            body.append(_text(width + 6, y + 28, bar.text, "bold" if bar.strong else ""))
            y += 36
    return y + 4, body


def _lines(chart: Lines) -> tuple[float, list[str]]:
    points = [line.points(chart.logarithmic) for line in chart.lines]
    every = [point for line in points for point in line]
    body, y = _title(chart.title)
    if not every:
        return y + 28, [*body, _text(0, y + 16, "no values", "soft")]
    y += 4
    if len(chart.lines) > 1:
        y += 4
        x = 0.0
        for i, line in enumerate(chart.lines):
            width = 18 + _LETTER * len(line.label) + 14
            if x and x + width > _WIDTH:
                x, y = 0.0, y + 18
            body.append(f'<rect class="{_fill(i)}" x="{x:g}" y="{y:g}" width="12" height="4"/>')
            body.append(_text(x + 17, y + 7, line.label, "soft"))
            x += width
        y += 18
    top, bottom = y + 4, y + 174
    low_y, high_y, marks = _scale([v for _, v in every], chart)
    low_x, high_x = min(v for v, _ in every), max(v for v, _ in every)
    left = 8 + _LETTER * max(len(number(mark)) for mark in marks)
    across = _place(low_x, high_x, left, _WIDTH - 6, False)
    down = _place(low_y, high_y, bottom, top, chart.logarithmic)
    for mark in marks:
        at = down(mark)
        body.append(
            f'<line class="rule" x1="{left:.1f}" x2="{_WIDTH}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
        body.append(_text(left - 6, at + 4, number(mark), "soft", "end"))
    for mark in ticks(low_x, high_x):
        body.append(_text(across(mark), bottom + 18, number(mark), "soft", "middle"))
    for i, line in enumerate(points):
        path = " ".join(f"{across(x):.1f},{down(v):.1f}" for x, v in _thinned(line))
        body.append(f'<polyline class="curve s{i % len(COLOURS)}" points="{path}"/>')
    middle = (left + _WIDTH) / 2
    body.append(_text(middle, bottom + 36, chart.x_title, "soft", "middle"))
    return bottom + 44, body


def _scale(values: Sequence[float], chart: Lines) -> tuple[float, float, list[float]]:
    """The ends of the vertical axis, and its numbers."""
    low, high = min(values), max(values)
    if chart.from_zero:
        low = min(0.0, low)
    if high == low:
        margin = abs(high) / 2 or 1.0
        low, high = (high / 2, high * 2) if chart.logarithmic else (low - margin, high + margin)
    return low, high, log_ticks(low, high) if chart.logarithmic else ticks(low, high)


def _place(
    low: float, high: float, start: float, end: float, logarithmic: bool
) -> Callable[[float], float]:
    """The function from values to positions."""
    if logarithmic:
        inner = _place(math.log(low), math.log(high), start, end, False)
        return lambda value: inner(math.log(value))
    span = (high - low) or 1.0
    return lambda value: start + (end - start) * (value - low) / span


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most 400 points, evenly chosen, with the first and the last."""
    if len(points) <= _MOST_POINTS:
        return points
    last = len(points) - 1
    return [points[round(i * last / (_MOST_POINTS - 1))] for i in range(_MOST_POINTS)]


def _stack(chart: Stack) -> tuple[float, list[str]]:
    body, first = _title(chart.title)
    first += 8
    total = sum(part.value for part in chart.parts)
    end = max([total, *(mark.value for mark in chart.marks)]) or 1.0
    unit = (_WIDTH - 4) / end
    top = first + 16 * len(chart.marks)
    x = 0.0
    for i, part in enumerate(chart.parts):
        width = part.value * unit
        name = f"<title>{escape(part.label)}: {escape(part.text)}</title>"
        place = f'x="{x:.2f}" y="{top:g}" width="{width:.2f}" height="34"'
        body.append(f'<rect class="{_fill(i)}" {place}>{name}</rect>')
        x += width
    for i, mark in enumerate(chart.marks):
        at, y = mark.value * unit, first + 16 * i
        body.append(
            f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{y + 2:g}" y2="{top + 40:g}"/>'
        )
        label = f"{mark.label}: {mark.text}"
        before = at + 6 + _LETTER * len(label) > _WIDTH
        body.append(_text(at - 6 if before else at + 6, y + 10, label, "", "end" if before else ""))
    y = top + 48.0
    for i, part in enumerate(chart.parts):
        y += 18
        body.append(
            f'<rect class="{_fill(i)}" x="0" y="{y - 10:g}" width="11" height="11" rx="2"/>'
        )
        body.append(_text(18, y, part.label))
        body.append(_text(_WIDTH - 60, y, part.text, "", "end"))
        share = f"{part.value / total:.1%}" if total else ""
        body.append(_text(_WIDTH, y, share, "soft", "end"))
    return y + 8, body


def _title(title: str) -> tuple[list[str], float]:
    """The title in as many lines as it needs, and the height below them."""
    lines = textwrap.wrap(title, int(_WIDTH / _BOLD_LETTER)) or [""]
    return [_text(0, 14 + 16 * i, line, "bold") for i, line in enumerate(lines)], 4.0 + 16 * len(
        lines
    )


def _fill(index: int) -> str:
    return f"f{index % len(COLOURS)}"


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    anchor = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind}{anchor}>{escape(text, quote=False)}</text>'
