"""The documents that show results: README.md, docs/benchmarks.md and peftkit/expectations.json, written from the stored results.

    python benchmarks/run.py docs

writes them again without measuring. A benchmark with ``--update-docs`` does the same after it has saved its result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import host
import learning
import memory_plans
import operations
import overhead
import prefix
import quantised
import records
import steps
import strategies
import suite_tables
import summary
import tuning
from points import AXES, BASE
from report import HERE, load, machine

ROOT = HERE.parent
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
EXPECTATIONS = ROOT / "peftkit" / "expectations.json"

HELP = "write the documents again from the stored results"


def _kernels() -> str:
    result = load("kernels-cpu")
    return operations.table(result["rows"], machine(result["environment"]))


TABLES: dict[str, Callable[[], str]] = {
    "training": lambda: _cases("training", steps.Training.CASES),
    "parts": lambda: steps.parts_table(load("parts-smollm2")),
    "methods": lambda: suite_tables.tables(_rows("methods")),
    "scaling": lambda: suite_tables.along_axes(_rows("scaling"), AXES, BASE),
    "earlier methods": lambda: _cases("methods", ("smollm2", "experts")),
    "quantised": lambda: "\n\n".join(map(quantised.table, quantised.stored())),
    "learning": lambda: learning.table(load("learning")),
    "learning-bases": lambda: learning.bases_table(load("learning-bases")),
    "tuning": lambda: tuning.table(load("tuning")),
    "strategies": strategies.stored_table,
    "overhead": lambda: overhead.table(load("overhead")),
    "kernels": _kernels,
    "prefix": lambda: prefix.table(load("prefix")),
    "host": lambda: host.table(load("host")),
    "plan": lambda: memory_plans.table(load("plan")),
}
"""The text between the marks of docs/benchmarks.md, by mark. A mark that is the name of a benchmark has its table."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command: none."""


def run(arguments: argparse.Namespace) -> None:
    """Write every document."""
    for path, text in documents().items():
        path.write_text(text)


def documents() -> dict[Path, str]:
    """The whole text that each document must have."""
    benchmarks = BENCHMARKS.read_text()
    for mark, table in TABLES.items():
        benchmarks = between(benchmarks, mark, table())
    return {
        README: between(README.read_text(), "measured", summary.table()),
        BENCHMARKS: benchmarks,
        EXPECTATIONS: json.dumps(summary.expectations(), indent=1) + "\n",
    }


def between(page: str, mark: str, text: str) -> str:
    """The page with ``text`` between the marks named ``mark``.

    Raises:
        SystemExit: The page lacks the marks.
    """
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"the page lacks the marks {begin} and {end}; add them first")
    return f"{before}{begin}\n{text}\n{end}{after}"


def _rows(suite: str) -> list[dict[str, Any]]:
    return [row for row in records.stored() if row["suite"] == suite]


def _cases(benchmark: str, cases: Iterable[str]) -> str:
    return "\n\n".join(steps.table(load(f"{benchmark}-{case}")) for case in cases)
