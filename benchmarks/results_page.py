"""One HTML page with every result: "LoRA or full" as a picture, and a table to sort and filter.

    python benchmarks/run.py page
    python benchmarks/run.py page --out page.html --plots plots --format png

The page is one file that loads nothing. It reads ``benchmarks/results/``; nothing is measured.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import suite_tables
from page_rows import device_of, label_of, measured, rows, shape_of
from report import HERE, RESULTS

from peftkit.report_page import (
    Bar,
    Bars,
    Group,
    Line,
    Lines,
    Tile,
    bullets,
    chosen,
    figure,
    figures,
    page,
    paragraph,
    section,
    table,
    tiles,
    write_chart,
    write_page,
)

HELP = "one page with every result, to sort, filter and look at"
_MOST_BARS = 12


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--out", type=Path, default=HERE.parent / "out" / "benchmarks.html")
    parser.add_argument("--plots", type=Path, help="also write each chart to this folder")
    parser.add_argument("--format", choices=("svg", "png"), default="svg", help="of the charts")


def run(arguments: argparse.Namespace) -> None:
    """Write the page, and the charts if they are asked for."""
    found = rows(RESULTS)
    write_page(arguments.out, text(found))
    print(arguments.out)
    if arguments.plots is not None:
        for name, chart in plots(found).items():
            print(write_chart(chart, arguments.plots / f"{name}.{arguments.format}"))


def write(found: list[dict[str, Any]], out: Path) -> None:
    """Write the page of these rows alone, and say where it is."""
    write_page(out, text(found))
    print(out, file=sys.stderr)


def text(found: list[dict[str, Any]]) -> str:
    """The page. What was found is said first, then shown, then listed."""
    if not found:
        return page("Benchmarks of peftkit", paragraph("There are no results yet."))
    devices = list(dict.fromkeys(map(device_of, found)))
    ok = sum(row["status"] == "ok" for row in found)
    lead = "Time and memory of training steps with peftkit, PEFT, other libraries and full fine-tuning, as measured."
    if not ok:
        lead = f"No step has a speed that may be shown. The first reason: {found[0].get('reason')}."
    return page(
        "Benchmarks of peftkit",
        _comparison(found),
        tiles(
            [
                Tile(f"{ok:,}", "measured steps"),
                Tile(f"{len(found) - ok:,}", "refused or absent, with the reason"),
                Tile(str(len(devices)), "devices"),
            ]
        ),
        _scaling(found),
        _table(found),
        lead=lead,
    )


def headline(best: list[dict[str, Any]]) -> str:
    """What the fastest rows of a place say about LoRA or full fine-tuning, as a sentence; empty if one of the two is missing."""
    own = [row for row in best if row["method"] == "lora"]
    whole = [row for row in best if row["method"] == "full"]
    if not own or not whole:
        return ""
    first, full = own[0], whole[0]
    parts = [f"{first['step_seconds'] / full['step_seconds']:.2f} x the time"]
    sizes = [measured(row, "peak_bytes") or 0 for row in (first, full)]
    if min(sizes) > 0:
        parts.append(f"{sizes[0] / sizes[1]:.2f} x the memory")
    return (
        f"{label_of(first)} takes {' and '.join(parts)} of {label_of(full)}: "
        f"{_seconds(first['step_seconds'])} against {_seconds(full['step_seconds'])} a step."
    )


def comparisons(found: list[dict[str, Any]]) -> dict[tuple[str, str], Bars]:
    """Time and memory of every method, by device and case."""
    return {
        (device, case): _bars(f"LoRA or full: {case} on {device}", best)
        for (device, case), best in _places(found).items()
        if len(best) > 1
    }


def _places(found: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The fastest row of every method, by device and case."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found:
        if row["status"] == "ok" and measured(row, "step_seconds") is not None:
            groups.setdefault((device_of(row), _case(row)), []).append(row)
    return {place: _fastest(members) for place, members in groups.items()}


def _case(row: dict[str, Any]) -> str:
    shape = shape_of({**row, "rank": None})
    return f"{row['case']}, {shape}" if shape else str(row["case"])


def _fastest(members: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest row of each label, in the order of time."""
    best: dict[str, dict[str, Any]] = {}
    for row in members:
        label = label_of(row)
        if label not in best or row["step_seconds"] < best[label]["step_seconds"]:
            best[label] = row
    return sorted(best.values(), key=lambda row: row["step_seconds"])[:_MOST_BARS]


def _bars(title: str, members: list[dict[str, Any]]) -> Bars:
    times = [
        Bar(label_of(r), r["step_seconds"], _seconds(r["step_seconds"]), _is_own(r))
        for r in members
    ]
    groups = [Group("Time of a training step (shorter is better)", times)]
    sized = [r for r in members if (measured(r, "peak_bytes") or 0) > 0]
    if sized:
        sizes = [
            Bar(label_of(r), r["peak_bytes"], _size(r["peak_bytes"]), _is_own(r)) for r in sized
        ]
        groups.append(Group("Memory that the step adds to the loaded model", sizes))
    return Bars(title, groups)


def _is_own(row: dict[str, Any]) -> bool:
    return str(row.get("library") or row.get("provider")).startswith("peftkit")


def _comparison(found: list[dict[str, Any]]) -> str:
    charts = comparisons(found)
    if not charts:
        return ""
    names = {pair: f"{pair[1]} on {pair[0]}" for pair in charts}
    said = {pair: headline(best) for pair, best in _places(found).items()}
    sentences = [
        sentence if len(charts) == 1 else f"{names[pair]}: {sentence}"
        for pair, sentence in said.items()
        if sentence and pair in charts
    ]
    pictures = [figure(chart, keys={"place": names[pair]}) for pair, chart in charts.items()]
    return section(
        "LoRA or full fine-tuning, on this machine, for this model",
        bullets(sentences) if len(sentences) > 1 else "".join(map(paragraph, sentences)),
        paragraph("Blue bars are peftkit's. The fastest run of each method is shown.", note=True),
        chosen("pictures", {"place": ("Model and machine", list(names.values()))}, every=False),
        figures(*pictures, name="pictures"),
    )


def scalings(found: list[dict[str, Any]]) -> dict[str, Lines]:
    """Time by length for everything that was measured at several lengths with the other sizes equal, by these sizes and the device."""
    series: dict[str, dict[str, dict[int, float]]] = {}
    for row in found:
        length, seconds = row.get("length"), measured(row, "step_seconds")
        if row["status"] == "ok" and row["suite"] == "scaling" and length and seconds is not None:
            sizes = [
                f"{name} {row[name]}" for name in ("batch", "rank", "adapters") if row.get(name)
            ]
            place = f"{', '.join([row['case'], *sizes])}, on {device_of(row)}"
            series.setdefault(place, {}).setdefault(label_of(row), {})[length] = seconds
    charts = {}
    for place, lines in series.items():
        several = {label: points for label, points in lines.items() if len(points) > 1}
        if several:
            curves = [
                Line(label, sorted(points), [points[x] for x in sorted(points)])
                for label, points in several.items()
            ]
            title = f"Seconds of a step: {place}"
            charts[place] = Lines(title, "tokens of a row", curves, from_zero=True)
    return charts


def _scaling(found: list[dict[str, Any]]) -> str:
    charts = scalings(found)
    return section("Longer rows", figures(*map(figure, charts.values()))) if charts else ""


def plots(found: list[dict[str, Any]]) -> dict[str, Bars | Lines]:
    """Every chart of the page, by a name for its file."""
    charts: dict[str, Bars | Lines] = {
        f"lora-or-full {case} {device}": chart
        for (device, case), chart in comparisons(found).items()
    }
    charts |= {f"scaling {place}": chart for place, chart in scalings(found).items()}
    return {re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"): c for name, c in charts.items()}


def _table(found: list[dict[str, Any]]) -> str:
    head = ["case", "method", "library", "provider", "shape", "device", "status", "step", "spread"]
    head += ["tokens/s", "memory", "trained", "last loss", "to target", "versions", "reason"]
    cells = [_row(row) for row in found]
    keys = [
        {
            "suite": str(row["suite"]),
            "device": device_of(row),
            "library": str(row.get("library") or ""),
            "method": str(row.get("method") or ""),
            "status": str(row["status"]),
        }
        for row in found
    ]
    choices = {
        key: (key, sorted({own[key] for own in keys if own[key]}))
        for key in ("suite", "device", "library", "method", "status")
    }
    return section(
        "Every result",
        paragraph("A click on a title sorts. Memory is what the step adds to the loaded model."),
        chosen("results", choices, search=True),
        table(head, cells, sortable=True, keys=keys, name="results"),
    )


def _row(row: dict[str, Any]) -> list[Any]:
    found = row["environment"]
    spread = row.get("step_spread")
    losses = row.get("losses") or []
    versions = [f"{k} {v}" for k, v in found.get("versions", {}).items()]
    versions += [str(found[key]) for key in ("commit", "date") if found.get(key)]
    return [
        str(row["case"]),
        str(row.get("method") or ""),
        str(row.get("library") or ""),
        str(row.get("provider") or ""),
        shape_of(row) + (", checkpointing" if row.get("checkpointing") else ""),
        device_of(row),
        str(row["status"]),
        _sorted(measured(row, "step_seconds"), _seconds),
        f"{_seconds(spread[0])} to {_seconds(spread[1])}" if spread else "",
        _sorted(measured(row, "tokens_per_second"), lambda v: f"{v:,.0f}"),
        _sorted(measured(row, "peak_bytes"), _size),
        _sorted(measured(row, "trainable"), lambda v: f"{v:,.0f}"),
        _sorted(float(losses[-1]), lambda v: f"{v:.4f}") if losses else "",
        _target(row),
        ", ".join(versions),
        str(row.get("reason") or ""),
    ]


def _target(row: dict[str, Any]) -> Any:
    """Time to the target loss, sorted by time; what was not reached comes last."""
    target = row.get("target")
    if not target:
        return ""
    seconds = target["seconds"] if target.get("reached") else 1e12
    return (f"{suite_tables.to_target(target)} (loss {row['target_loss']:g})", seconds)


def _sorted(value: float | None, form: Any) -> Any:
    return "" if value is None else (form(value), value)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _size(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
