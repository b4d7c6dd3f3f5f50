"""Texts of recordings: how they are changed before training, and how those of a model are compared with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from peftkit.finetune.schema import key
from peftkit.finetune.sound import RESAMPLE
from peftkit.finetune.tasks.scores import error_rate


@dataclass
class TextOptions:
    """Options of tasks in which texts say what a recording contains."""

    case: Literal["keep", "lower", "upper"] = key("keep", "Change the case of the texts")
    remove: str = key("", "Characters to remove from the texts, such as '?!,.'")
    max_seconds: float = key(30.0, "Longest recording; longer ones are bad rows", above=0)
    resample: bool = RESAMPLE


def changed_text(text: str, options: TextOptions) -> str:
    """The text without ``remove`` and in ``case``."""
    text = "".join(c for c in text if c not in options.remove)
    return getattr(text, options.case)() if options.case != "keep" else text


def error_rates(found: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """The error rates of words and of characters over all rows. Spaces in a row count as one."""
    words = [text.split() for text in found], [text.split() for text in wanted]
    letters = [[list(" ".join(row)) for row in rows] for rows in words]
    return {"wer": error_rate(*words), "cer": error_rate(*letters)}
