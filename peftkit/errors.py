"""The one error of promise 3: something would have failed silently."""

from __future__ import annotations

from collections.abc import Collection


class ContractError(ValueError):
    """A fine-tuning run would have gone wrong without a word; the message names the thing and a way out."""


def count(number: int, singular: str, plural: str | None = None) -> str:
    """A number with its noun: ``"1 entry"``, ``"2 entries"``; the plural is the singular with an "s" if it is not given."""
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def short(value: object) -> str:
    """``repr`` of a value in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def listing(names: Collection[str], shown: int = 5) -> str:
    """The first few names on lines of their own, and how many more there are."""
    lines = [f"  {name}" for name in list(names)[:shown]]
    if len(names) > shown:
        lines.append(f"  ... and {len(names) - shown} more")
    return "\n".join(lines)
