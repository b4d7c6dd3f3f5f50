"""The matrix as a Markdown page: a summary, then one table per method with its reasons below."""

import inspect
from collections import Counter
from typing import Any

from peftkit.compatibility import CELLS

_SIGNS = {"yes": "✓", "-": "–", "no": "no", "fails": "**fails**"}

Row = dict[str, dict[str, list[str]]]
"""Verdict and reason by method and cell."""


def counts(row: Row) -> str:
    """The number of cells of an architecture by verdict, as text."""
    verdicts = Counter(verdict for cells in row.values() for verdict, _ in cells.values())
    return ", ".join(f"{verdicts[kind]} {kind}" for kind in _SIGNS if verdicts[kind])


def markdown(results: dict[str, Any]) -> str:
    """The whole page."""
    families: dict[str, Row] = results["families"]
    methods = list(next(iter(families.values())))
    with_versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        "# What works on which architecture",
        "",
        "Written by `make matrix`. Every cell was run on the CPU on a tiny model with random weights. To test an architecture that is not",
        "listed, run `peftkit check --family NAME_OR_CONFIG`.",
        "",
        f"With {with_versions}.",
        "",
        "✓: works. no: refused; the reason is below the table. –: does not apply to this model. **fails**: an unintended error, or a wrong",
        "result.",
        "",
        *(f"- **{name}**: {inspect.getdoc(cell)}" for name, cell in CELLS.items()),
        "",
        "## Summary",
        "",
        "The number of cells that work, of those that apply.",
        "",
        "| | " + " | ".join(methods) + " |",
        "|---|" + "---|" * len(methods),
        *(
            f"| {name} | " + " | ".join(_share(row[method]) for method in methods) + " |"
            for name, row in families.items()
        ),
    ]
    for method in methods:
        lines += ["", f"## {method}", "", *_table(families, method, results["cells"])]
    return "\n".join(lines) + "\n"


def _share(cells: dict[str, list[str]]) -> str:
    verdicts = [verdict for verdict, _ in cells.values() if verdict != "-"]
    if set(verdicts) == {"no"}:
        return "no"
    share = f"{verdicts.count('yes')}/{len(verdicts)}"
    return f"**{share}**" if "fails" in verdicts else share


def _table(families: dict[str, Row], method: str, cells: list[str]) -> list[str]:
    reasons: dict[str, int] = {}
    rows = []
    for name, row in families.items():
        signs = []
        for cell in cells:
            verdict, why = row[method][cell]
            sign = _SIGNS[verdict]
            if verdict in ("no", "fails"):
                sign += f" {reasons.setdefault(why, len(reasons) + 1)}"
            signs.append(sign)
        rows.append(f"| {name} | " + " | ".join(signs) + " |")
    head = ["| | " + " | ".join(cells) + " |", "|---|" + "---|" * len(cells)]
    notes = [f"{number}. {why}" for why, number in reasons.items()]
    return [*head, *rows, *(["", *notes] if notes else [])]
