"""The suite's rows as Markdown tables, one for each device, set of instructions and sizes."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from points import reference_of

_SIZES = ("case", "batch", "length", "rank", "adapters", "checkpointing")


def tables(rows: list[dict[str, Any]]) -> str:
    """All rows, those of equal sizes in one table. A column ``/ reference`` is the ratio to the method's reference."""
    groups = groupby(sorted(rows, key=_order), key=_order)
    return "\n\n".join(_table(list(group)) for _, group in groups) or "Nothing was measured yet."


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["environment"]["device"], row["isa"], *(row[name] for name in _SIZES))


def _table(rows: list[dict[str, Any]]) -> str:
    speeds = {
        (row["method"], row["library"]): row["step_seconds"] for row in rows if row["step_seconds"]
    }
    return "\n".join(
        [
            _heading(rows[0]),
            "",
            "| method | library | step (s) | range (s) | / reference | tokens/s | peak growth (MiB) | trained parameters |",
            "|---|---|---|---|---|---|---|---|",
            *(_line(row, speeds) for row in rows),
        ]
    )


def _heading(row: dict[str, Any]) -> str:
    where, again = row["environment"], ", checkpointed" if row["checkpointing"] else ""
    loaded = f", {row['adapters']} adapters" if row["adapters"] > 1 else ""
    return (
        f"**{row['case']}, {row['batch']} x {row['length']} tokens, rank {row['rank']}{loaded}{again}** "
        f"({where['device']}, {where['threads']} threads, {where['isa']}, products by {where['products']}; "
        f"commit {where['commit']}, {where['date']})"
    )


def _line(row: dict[str, Any], speeds: dict[tuple[str, str], float]) -> str:
    name = f"| {row['method']} | {row['library']} |"
    if row["status"] != "ok":
        return f"{name} {row['status']}: {row['reason']} | | | | | |"
    low, high = row["step_spread"]
    reference = speeds.get((row["method"], reference_of(row["method"], row["library"])))
    ratio = f"{row['step_seconds'] / reference:.2f}" if reference else ""
    memory = row["allocator_bytes"] or row["peak_bytes"]
    return (
        f"{name} {row['step_seconds']:.3g} | {low:.3g}..{high:.3g} | {ratio} | {row['tokens_per_second']:.0f} | "
        f"{memory / 2**20:.0f} | {row['trainable']:,} |"
    )
