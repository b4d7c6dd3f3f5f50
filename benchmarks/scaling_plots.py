"""Plots of ``scaling``: step time and memory over one axis at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from points import Point
from suite_tables import by_value

_MEASURES = {"step_seconds": "step (s)", "peak_bytes": "memory that a step adds (MiB)"}


def write(
    rows: list[dict[str, Any]], axes: dict[str, tuple[Any, ...]], base: Point, folder: Path
) -> None:
    """Write ``scaling-<axis>.svg`` for each axis. Refused points are left out."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for axis, values in axes.items():
        figure, panes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
        for pane, (measure, label) in zip(panes, _MEASURES.items(), strict=True):
            for library, points in series(rows, axis, values, base, measure).items():
                names = [str(value) for value, _ in points]
                pane.plot(names, [number for _, number in points], marker="o", label=library)
            pane.set(xlabel=axis, ylabel=label)
            pane.legend()
        path = folder / f"scaling-{axis}.svg"
        temporary = path.with_suffix(".tmp")
        figure.savefig(temporary, format="svg")
        pyplot.close(figure)
        temporary.replace(path)


def series(
    rows: list[dict[str, Any]], axis: str, values: tuple[Any, ...], base: Point, measure: str
) -> dict[str, list[tuple[Any, float]]]:
    """The measured points on an axis by library: pairs of the axis' value and the measure, memory in MiB."""
    lines: dict[str, list[tuple[Any, float]]] = {"PEFT": [], "peftkit": []}
    scale = 2**20 if measure == "peak_bytes" else 1
    measured = [row for row in rows if row["status"] == "ok"]
    for value, pair in by_value(measured, axis, values, base):
        for library, row in pair.items():
            lines[library].append((value, row[measure] / scale))
    return lines
