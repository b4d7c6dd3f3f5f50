"""Draw charts as PNG with matplotlib, and write charts as files."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import ContractError
from peftkit.report_page.charts import Bars, Lines, Stack
from peftkit.report_page.style import COLOURS, GREY
from peftkit.report_page.svg import to_svg
from peftkit.report_page.writing import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
}


def write_chart(chart: Bars | Lines | Stack, path: str | os.PathLike[str]) -> Path:
    """Write a chart as the kind of picture that the name of ``path`` ends with: ``.svg`` or ``.png``.

    Raises:
        ContractError: The name has another ending, or ``.png`` without matplotlib.
        OSError: The file cannot be written.
    """
    path = Path(path)
    if path.suffix == ".svg":
        content = to_svg(chart, file=True).encode()
    elif path.suffix == ".png":
        content = to_png(chart)
    else:
        raise ContractError(f"{path} has no known kind of picture; use a name with .svg or .png")
    write_bytes(path, content)
    return path


def to_png(chart: Bars | Lines | Stack) -> bytes:
    """Draw a chart, light, 150 dots to the inch.

    Raises:
        ContractError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ContractError(
            "PNG files need matplotlib; install it (pip install matplotlib), or write an .svg file"
        ) from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        if isinstance(chart, Bars):
            _bars(chart, figure)
        elif isinstance(chart, Lines):
            _lines(chart, figure)
        else:
            _stack(chart, figure)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=150, metadata={"Software": None})
    return out.getvalue()


def _bars(chart: Bars, figure: Figure) -> None:
    counts = [max(len(group.bars), 1) for group in chart.groups]
    figure.set_size_inches(7, 0.8 + sum(0.6 + 0.36 * count for count in counts))
    figure.suptitle(chart.title, x=0.01, ha="left", fontweight="bold")
    axes = figure.subplots(len(counts), 1, squeeze=False, height_ratios=counts)[:, 0]
    for group, one in zip(chart.groups, axes, strict=True):
        colours = [COLOURS[0][0] if bar.strong else GREY[0] for bar in group.bars]
        places = range(len(group.bars))
        drawn = one.barh(places, [bar.value for bar in group.bars], color=colours, height=0.7)
        one.bar_label(drawn, [bar.text for bar in group.bars], padding=4)
        one.set_yticks(places, [bar.label for bar in group.bars])
        one.invert_yaxis()
        one.set_title(group.title)
        one.set_xticks([])
        one.spines["bottom"].set_visible(False)
        if group.full:
            one.set_xlim(0, group.full * 1.15)
        else:
            one.margins(x=0.15)


def _lines(chart: Lines, figure: Figure) -> None:
    figure.set_size_inches(7, 3.4)
    axes = figure.subplots()
    for i, line in enumerate(chart.lines):
        points = line.points(chart.logarithmic)
        axes.plot(*_columns(points), color=COLOURS[i % len(COLOURS)][0], label=line.label)
    axes.set(title=chart.title, xlabel=chart.x_title)
    if chart.logarithmic:
        axes.set_yscale("log")
    if chart.from_zero:
        axes.set_ylim(bottom=0)
    if len(chart.lines) > 1:
        axes.legend(frameon=False)


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _stack(chart: Stack, figure: Figure) -> None:
    figure.set_size_inches(7, 1.9 + 0.22 * len(chart.parts))
    axes = figure.subplots()
    left, handles = 0.0, []
    for i, part in enumerate(chart.parts):
        colour = COLOURS[i % len(COLOURS)][0]
        handles += axes.barh(0, part.value, left=left, color=colour, height=0.6)
        left += part.value
    for mark in chart.marks:
        axes.axvline(mark.value, color="black", linestyle="--", linewidth=1.2)
        label: dict[str, Any] = {"ha": "right" if mark.value >= left else "left", "va": "bottom"}
        axes.text(mark.value, 0.45, f" {mark.label}: {mark.text} ", fontsize=9, **label)
    names = [f"{part.label}: {part.text}" for part in chart.parts]
    axes.legend(handles, names, frameon=False, loc="upper left", bbox_to_anchor=(0, 0))
    axes.set_title(chart.title)
    axes.set_ylim(-0.4, 0.4 + 0.25 * bool(chart.marks))
    axes.set_axis_off()
