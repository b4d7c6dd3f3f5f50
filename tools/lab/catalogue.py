"""The operations of the package: the formula, the implementations and the tensors kept for backward of each."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

from lab.cases import OPERATIONS, chosen
from lab.inventory import OPS


def rows(ops: list[str] | None = None) -> list[dict[str, Any]]:
    """One row for each operation: ``op``, ``implementations``, ``keeps`` and ``computes``, the first sentence of its README.

    Args:
        ops: Keys of ``cases.OPERATIONS``; ``None`` means all.
    """
    return [
        {
            "op": op,
            "implementations": ["reference", "torch", *(["triton"] if op in OPS else [])],
            "computes": first_sentence(op),
            "keeps": OPERATIONS[op].keeps or "nothing",
        }
        for op in chosen(ops, OPERATIONS)
    ]


def first_sentence(op: str) -> str:
    """The first sentence of an operation's README, below its title."""
    package = files("peftkit_kernels")
    homes = [package / part / op / "README.md" for part in ("ops", "storage")]
    text = next(file for file in homes if file.is_file()).read_text(encoding="utf-8")
    paragraph = " ".join(text.split("\n\n")[1].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", paragraph)[0]
