"""The suite's rows as Markdown tables, one for each device, set of instructions and sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from typing import Any

from points import AXES, LIBRARIES, Point, reference_of
from report import machine

_SIZES = ("case", "batch", "length", "rank", "adapters", "checkpointing")
"""The fields of a row that ``Point.sizes`` has, in its order."""


def tables(rows: list[dict[str, Any]]) -> str:
    """All rows, those of equal sizes in one table. A column ``/ reference`` is the ratio to the method's reference."""
    groups = groupby(sorted(rows, key=_order), key=_order)
    return (
        "\n\n".join(_table(sorted(group, key=_place)) for _, group in groups)
        or "Nothing was measured yet."
    )


def along_axes(rows: list[dict[str, Any]], axes: dict[str, tuple[Any, ...]], base: Point) -> str:
    """The rows of ``scaling``, those of each axis in one table with a line for each value."""
    groups = [list(group) for _, group in groupby(sorted(rows, key=_machine), key=_machine)]
    found = [_along(group, axis, base, axes[axis]) for group in groups for axis in axes]
    return "\n\n".join(filter(None, found)) or "Nothing was measured yet."


def _along(rows: list[dict[str, Any]], axis: str, base: Point, values: tuple[Any, ...]) -> str:
    lines, reasons, measured = [], [], []
    for value, found in by_value(rows, axis, values, base):
        pair = list(found.values())
        if len(pair) < 2:
            continue
        step = _compared(pair, "step_seconds", lambda seconds: f"{seconds:.3g}")
        memory = _compared(pair, "peak_bytes", lambda size: f"{size / 2**20:.0f}")
        lines.append([str(value), *step, *memory])
        measured += pair
        reasons += [
            f"{value} in {row['library']} was {row['status']}: {row['reason']}"
            for row in pair
            if row["status"] != "ok"
        ]
    if not lines:
        return ""
    others = ", ".join(f"{name} {getattr(base, name)}" for name in AXES if name != axis)
    head = [axis, "PEFT (s)", "peftkit (s)", "/ PEFT", "PEFT (MiB)", "peftkit (MiB)", "/ PEFT"]
    table = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]
    text = "\n".join([f"**{axis}**; {others} {_place_of(measured[-1])}", "", *table])
    return text + (f"\n\n{'; '.join(reasons)}." if reasons else "")


def by_value(
    rows: list[dict[str, Any]], axis: str, values: tuple[Any, ...], base: Point
) -> list[tuple[Any, dict[str, dict[str, Any]]]]:
    """For each value of an axis the rows there by library, PEFT's before ours; a row that is missing is left out."""
    found = {(row["library"], _sizes_of(row)): row for row in rows}
    points = [(value, replace(base, **{axis: value}).sizes) for value in values]
    return [
        (value, {name: found[name, at] for name in ("PEFT", "peftkit") if (name, at) in found})
        for value, at in points
    ]


def _compared(pair: list[dict[str, Any]], measure: str, shown: Callable[[float], str]) -> list[str]:
    """A measure of PEFT's row and of ours, and its ratio; a refused row has none."""
    cells = [shown(row[measure]) if row["status"] == "ok" else row["status"] for row in pair]
    both = all(row["status"] == "ok" for row in pair)
    return [*cells, f"{pair[1][measure] / pair[0][measure]:.2f}" if both else ""]


def _sizes_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What ``Point.sizes`` is of the point of a row."""
    return tuple(row[name] for name in _SIZES)


def _place(row: dict[str, Any]) -> tuple[int, int]:
    """The place of a row in its table, which is not that of its measurement."""
    return list(LIBRARIES).index(row["method"]), LIBRARIES[row["method"]].index(row["library"])


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return (*_machine(row), *_sizes_of(row))


def _machine(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["environment"]["device"], row["isa"]


def _table(rows: list[dict[str, Any]]) -> str:
    speeds = {
        (row["method"], row["library"]): row["step_seconds"] for row in rows if row["step_seconds"]
    }
    head = [
        *("method", "library", "step (s)", "range (s)", "/ reference", "tokens/s"),
        *("peak growth (MiB)", "of it torch's (MiB)", "trained parameters"),
    ]
    targets = [row.get("target") for row in rows if row.get("target")]
    if targets:
        loss = next(row["target_loss"] for row in rows if row.get("target"))
        head.append(f"to a held-out loss of {loss:g} (s)")
    lines = [head, ["---"] * len(head), *(_cells(row, speeds, len(head)) for row in rows)]
    table = "\n".join([_heading(rows[0]), "", *(f"| {' | '.join(line)} |" for line in lines)])
    ahead = _ahead(rows)
    return table + (f"\n\nAhead of peftkit: {'; '.join(ahead)}." if ahead else "")


def _ahead(rows: list[dict[str, Any]]) -> list[str]:
    """The libraries that are faster than peftkit or take less memory, each in words."""
    own = {row["method"]: row for row in rows if row["library"] == "peftkit"}
    found = []
    for row in rows:
        ours = own.get(row["method"], row)
        if row is ours or row["status"] != "ok" or ours["status"] != "ok":
            continue
        time = round(row["step_seconds"] / ours["step_seconds"], 2)
        memory = round(row["peak_bytes"] / ours["peak_bytes"], 2)
        if min(time, memory) < 1:
            apart = row["step_spread"][1] < ours["step_spread"][0]
            overlap = " (the ranges overlap)" if time < 1 and not apart else ""
            found.append(
                f"{row['library']} in {row['method']}, with {time:.2f} x its time{overlap} and {memory:.2f} x its memory"
            )
    return found


def _heading(row: dict[str, Any]) -> str:
    again = ", checkpointed" if row["checkpointing"] else ""
    loaded = f", {row['adapters']} adapters" if row["adapters"] > 1 else ""
    return f"**{row['case']}, {row['batch']} x {row['length']} tokens, rank {row['rank']}{loaded}{again}** {_place_of(row)}"


def _place_of(row: dict[str, Any]) -> str:
    """Where and when a row was measured."""
    where = row["environment"]
    device = {"cpu": where["device"], "threads": where["threads"], "instructions": where["isa"]}
    return f"({machine(device)}, products by {where['products']}; commit {where['commit']}, {where['date']})"


def _cells(row: dict[str, Any], speeds: dict[tuple[str, str], float], count: int) -> list[str]:
    name = [row["method"], row["library"]]
    if row["status"] != "ok":
        cells = [*name, f"{row['status']}: {row['reason']}"]
    else:
        low, high = row["step_spread"]
        reference = speeds.get((row["method"], reference_of(row["method"], row["library"])))
        cells = [
            *name,
            f"{row['step_seconds']:.3g}",
            f"{low:.3g}..{high:.3g}",
            f"{row['step_seconds'] / reference:.2f}" if reference else "",
            f"{row['tokens_per_second']:.0f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{row['allocator_bytes'] / 2**20:.0f}",
            f"{row['trainable']:,}",
        ]
        if row.get("target"):
            cells.append(to_target(row["target"]))
    return cells + [""] * (count - len(cells))


def to_target(target: dict[str, Any]) -> str:
    """How long a point trained until its target, in words."""
    if "failed" in target:
        return f"failed: {target['failed']}"
    steps = f"{target['steps']} steps"
    if target["reached"]:
        return f"{target['seconds']:.3g}, {steps}"
    return f"not reached: {target['held_out'][-1][1]:.4g} after {steps}"
