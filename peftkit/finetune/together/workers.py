"""The worker threads of OpenMP, of which each thread that computes has its own."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

_SOFT = 1
"""``omp_pause_soft`` of OpenMP 5.0."""


def release_workers() -> None:
    """End the idle workers of this thread; its next computation starts new ones.

    libgomp lets workers sleep between two computations as soon as there are more of them, those of idle threads included, than processors. To wake
    them takes as long as a small product: with two trainings in two threads a step of SmolLM2 takes 1.3 times as long.
    """
    for library in _libraries():
        library.omp_pause_resource_all(_SOFT)


@functools.cache
def _libraries() -> list[ctypes.CDLL]:
    """The libraries of OpenMP that torch brings and has loaded, if they can be paused."""
    import torch

    folder = Path(torch.__file__).parent
    files = [file for name in ("lib", "../torch.libs") for file in (folder / name).glob("lib*omp*")]
    found = []
    for file in files:
        try:
            library = ctypes.CDLL(str(file.resolve()))
        except OSError:
            continue  # not a library of this system
        if hasattr(library, "omp_pause_resource_all"):
            found.append(library)
    return found
