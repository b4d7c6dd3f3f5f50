"""Loops over blocks, which a dry run shortens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from peftkit_kernels.core.modes import innermost_mode


def starts(stop: int, step: int) -> Iterable[int]:
    """``range(0, stop, step)`` for a loop over blocks that frees what one iteration allocates in the next one, at the latest.

    A dry run computes no values: each iteration between the first and the last allocates and frees the same memory. A dispatch mode
    with an attribute ``times_run`` therefore runs only one of them. ``times_run`` is how often a real run runs what runs now.
    """
    mode = innermost_mode()
    if not hasattr(mode, "times_run") or stop <= 3 * step:
        return range(0, stop, step)
    return _shortened(mode, stop, step)


def _shortened(mode: Any, stop: int, step: int) -> Iterator[int]:
    count = -(-stop // step)
    yield 0
    before = mode.times_run
    mode.times_run = before * (count - 2)
    try:
        yield step
    finally:
        mode.times_run = before
    yield (count - 1) * step
