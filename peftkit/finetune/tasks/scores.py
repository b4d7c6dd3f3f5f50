"""Scores of classifiers and of spans, from arrays of class numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from peftkit.finetune.tasks.base import IGNORED


def accuracy(found: Any, wanted: Any) -> float:
    """The share of equal numbers."""
    return float(np.mean(np.asarray(found) == np.asarray(wanted)))


def token_accuracy(found: Any, labels: Any) -> float:
    """The share of labelled tokens that were found; 0 if no token has a label.

    Args:
        found: ``Int[rows, length]``.
        labels: ``Int[rows, length]``, -100 for tokens without a label.
    """
    used = labels != IGNORED
    return float((found == labels)[used].mean()) if used.any() else 0.0


def macro_f1(found: Any, wanted: Any) -> float:
    """The mean over the classes of the harmonic mean of precision and recall; classes without any row are left out."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    scores = []
    for label in np.union1d(found, wanted):
        both = np.sum((found == label) & (wanted == label))
        scores.append(2 * both / (np.sum(found == label) + np.sum(wanted == label)))
    return float(np.mean(scores))


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """The spans of tags in BIO or IO form: first token, the one after the last, and the kind.

    A span starts at ``B-X``, or at ``I-X`` or ``X`` if the tag before is of another kind. ``O`` is outside.
    """
    found, start, kind = set(), 0, ""
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, rest = tag.partition("-")
        own = "" if tag == "O" else rest if prefix in ("B", "I") and rest else tag
        if kind and (own != kind or prefix == "B"):
            found.add((start, index, kind))
            kind = ""
        if own and not kind:
            start, kind = index, own
    return found


def span_f1(found: list[Sequence[str]], wanted: list[Sequence[str]]) -> float:
    """The harmonic mean of precision and recall of whole spans over all rows; 0 if there are none."""
    both = predicted = true = 0
    for one, other in zip(found, wanted, strict=True):
        ours, theirs = spans(one), spans(other)
        both, predicted, true = both + len(ours & theirs), predicted + len(ours), true + len(theirs)
    return 2 * both / (predicted + true) if predicted + true else 0.0


def error_rate(found: Sequence[Sequence[Any]], wanted: Sequence[Sequence[Any]]) -> float:
    """Changes that turn what was found into what was wanted, divided by the length of what was wanted, over all rows.

    Of words it is the word error rate, of characters the character error rate.
    """
    changes = sum(edit_distance(one, other) for one, other in zip(found, wanted, strict=True))
    return changes / max(1, sum(map(len, wanted)))


def edit_distance(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The smallest number of insertions, deletions and replacements between two sequences (Levenshtein, 1966)."""
    row = list(range(len(second) + 1))
    for number, one in enumerate(first, start=1):
        diagonal, row[0] = row[0], number
        for place, other in enumerate(second, start=1):
            best = min(row[place] + 1, row[place - 1] + 1, diagonal + (one != other))
            diagonal, row[place] = row[place], best
    return row[-1]
