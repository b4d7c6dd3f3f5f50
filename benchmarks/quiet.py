"""Whether the machine was quiet while something was measured: a fixed amount of work, timed, and the load of other processes.

python benchmarks/quiet.py        # how much the time of this work varies here, now
"""

from __future__ import annotations

import math
import os
import resource
import time
from pathlib import Path
from typing import NamedTuple

_SIZE, _PRODUCTS, _REPEATS = 512, 20, 3
"""The work of ``spin``: products of two square matrices, which every thread of torch takes part in."""

_STAT = Path("/proc/stat")
_BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
"""Fields of a line of ``/proc/stat`` in which a processor works or is taken away: all but idle, iowait, and guests' time."""


def spin() -> float:
    """Seconds of a fixed amount of work on all threads of torch: the best of a few repeats."""
    import torch

    a = torch.full((_SIZE, _SIZE), 1e-3)
    best = math.inf
    for _ in range(_REPEATS):
        start = time.perf_counter()
        for _ in range(_PRODUCTS):
            torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return best


class Calibration(NamedTuple):
    """How much ``spin`` varies now.

    Attributes:
        best: The shortest spin, in seconds.
        spread: 95 % of the spins took at most so many times as long.
        others: The mean number of cores that other processes kept busy meanwhile, or ``None`` if it is unknown.
        count: The number of spins.
    """

    best: float
    spread: float
    others: float | None
    count: int

    def __str__(self) -> str:
        """The numbers in a sentence."""
        others = (
            "" if self.others is None else f"; other processes kept {self.others:.2f} cores busy"
        )
        return (
            f"{self.count} repetitions of a fixed amount of work: best {1e3 * self.best:.1f} ms, 95 % took at most "
            f"{self.spread:.3f} x as long{others}"
        )


def calibrate(count: int = 20) -> Calibration:
    """Repeat ``spin``."""
    watch = Watch()
    seconds = sorted(spin() for _ in range(count))
    at = math.ceil(0.95 * count) - 1
    return Calibration(seconds[0], seconds[at] / seconds[0], watch.others(), count)


def wait(most: float, seconds: float) -> float:
    """Repeat ``spin`` until it takes at most ``most`` seconds, for at most ``seconds`` in all; returns the last one."""
    end = time.monotonic() + seconds
    last = spin()
    while last > most and time.monotonic() < end:
        time.sleep(1)
        last = spin()
    return last


class Watch:
    """Counts the processor time that other processes take from now on.

    Linux only: elsewhere ``others`` is ``None``, and the spin alone tells whether the machine is quiet.
    """

    def __init__(self) -> None:
        self._start = self._now()

    def others(self) -> float | None:
        """The mean number of this process's cores that other processes kept busy since the start.

        Time of this process and of its finished children does not count. ``/proc/stat`` counts in hundredths of a second, so
        watch for a second at least.
        """
        start, now = self._start, self._now()
        if start is None or now is None:
            return None
        elapsed = now.wall - start.wall
        return max(0.0, (now.busy - start.busy - (now.own - start.own)) / elapsed)

    @staticmethod
    def _now() -> _Times | None:
        busy = _busy_seconds()
        if busy is None:
            return None
        usages = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        own = sum(usage.ru_utime + usage.ru_stime for usage in usages)
        return _Times(time.perf_counter(), busy, own)


class _Times(NamedTuple):
    wall: float
    busy: float
    own: float


def _busy_seconds() -> float | None:
    """Seconds in which the cores that this process may use worked, summed over them, since the machine started."""
    if not _STAT.exists():
        return None
    cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = [line.split() for line in _STAT.read_text().splitlines()]
    ticks = [int(line[1 + i]) for line in lines if line[0] in cores for i in _BUSY_FIELDS]
    return sum(ticks) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    print(calibrate(100))
