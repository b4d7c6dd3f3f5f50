"""The error for mistakes that would otherwise fail silently, and helpers for error messages."""

from __future__ import annotations

from collections.abc import Collection


class ContractError(ValueError):
    """A fine-tuning run would have failed silently. The message names the cause and a way out."""


def count(number: int, singular: str, plural: str | None = None) -> str:
    """Return a number with its noun: ``"1 entry"``, ``"2 entries"``. The default plural is the singular with an "s"."""
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def short(value: object) -> str:
    """Return the ``repr`` of a value, truncated to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def listing(names: Collection[str], shown: int = 5) -> str:
    """Return the first ``shown`` names, one per line, and the number of further names."""
    lines = [f"  {name}" for name in list(names)[:shown]]
    if len(names) > shown:
        lines.append(f"  ... and {len(names) - shown} more")
    return "\n".join(lines)
