"""The largest batch that fits, with few plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from peftkit.planning.result import MemoryPlan

_CERTAIN = 0.9
"""A larger batch is not planned if it would not fit even with this share of the memory that a row is predicted to need."""


@dataclass(frozen=True, slots=True)
class Line:
    """Memory as a function of the rows of a batch. It says which batch to plan next, never whether a batch fits.

    Attributes:
        start: Bytes without rows: weights, the state of the optimiser.
        row: Bytes for each row.
        length: Tokens of a row.
        is_measured: Whether two plans say it. One plan does not tell what grows with the batch.
    """

    start: float
    row: float
    length: int
    is_measured: bool

    def at(self, rows: int) -> float:
        """Bytes for a batch of ``rows``."""
        return self.start + self.row * rows

    def at_length(self, length: int) -> Line:
        """The line of longer or shorter rows, which need memory in proportion."""
        return replace(self, row=self.row * length / self.length, length=length)


def largest_batch(
    planned: Callable[[int], MemoryPlan], sizes: Sequence[int], budget_bytes: int, line: Line | None
) -> tuple[MemoryPlan | None, MemoryPlan | None, Line]:
    """Find the largest batch whose plan fits.

    Memory grows about linearly with the rows of a batch, so plans of two batches tell which one to try next.

    Args:
        planned: Makes the plan of a batch.
        sizes: Sizes to choose from, ascending.
        budget_bytes: The memory.
        line: What plans with the same settings but another length say about this one, if there are any.

    Returns:
        The plan of the largest batch that fits, or ``None``; the plan of the smallest one, if it was made, as it is if none fits; and what
        the plans say about other lengths.
    """
    made: dict[int, MemoryPlan] = {}
    low, high = -1, len(sizes) - 1  # the largest that is known to fit, and that may fit
    known, guess = line, 0 if line is None else None
    while low < high:
        if guess is None:
            assert line is not None
            fitting = [i for i in range(high + 1) if line.at(sizes[i]) <= budget_bytes]
            guess = max(fitting[-1] if fitting else 0, low + 1)
        at, guess = guess, None
        tried = made[at] = planned(sizes[at])
        if tried.fits(budget_bytes):
            low = at
        else:
            high = at - 1
        line = _line(made, sizes, tried.settings["seq_len"], known)
        if 0 <= low < high:
            row = _least_growth(made, sizes, low, known)
            added = _CERTAIN * row * (sizes[low + 1] - sizes[low])
            if made[low].reserved_bytes + added > budget_bytes:
                break
    assert line is not None
    return made.get(low), made.get(0), line


def _line(
    made: dict[int, MemoryPlan], sizes: Sequence[int], length: int, known: Line | None
) -> Line:
    """Through the plans of the smallest and the largest batch; of one plan, through what is known about other lengths."""
    first, last = min(made), max(made)
    if first != last:
        row = _slope(made, sizes, first, last)
        return Line(made[first].reserved_bytes - row * sizes[first], row, length, True)
    only = made[first]
    start = known.start if known is not None else only.loaded_bytes
    row = max((only.reserved_bytes - start) / sizes[first], 0.0)
    return Line(start, row, length, known is not None and known.is_measured)


def _least_growth(
    made: dict[int, MemoryPlan], sizes: Sequence[int], low: int, known: Line | None
) -> float:
    """The bytes that each row beyond those of batch ``low`` adds at least; 0 if the plans do not tell.

    The peak is the largest of several sums that grow with the rows, so each row adds at least what those before it added.
    """
    first = min(made)
    if first < low:
        return _slope(made, sizes, first, low)
    if known is None or not known.is_measured:
        return 0.0
    return max(min(known.row, (made[low].reserved_bytes - known.start) / sizes[low]), 0.0)


def _slope(made: dict[int, MemoryPlan], sizes: Sequence[int], first: int, last: int) -> float:
    growth = made[last].reserved_bytes - made[first].reserved_bytes
    return max(growth / (sizes[last] - sizes[first]), 0.0)
