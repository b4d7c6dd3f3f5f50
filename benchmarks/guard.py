"""Runs a measurement while the machine is quiet: waits before it, watches during it, and repeats it if other work disturbed it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import quiet
import verdict


class Guard:
    """Knows how long the fixed work of ``quiet.spin`` takes here at best; how much it varies now goes to standard error.

    Attributes:
        calm: The variation at the start.
        best_spin: The shortest spin so far, in seconds.
    """

    def __init__(self) -> None:
        self.calm = quiet.calibrate()
        self.best_spin = self.calm.best
        print(f"{self.calm}{verdict.of_calibration(self.calm.spread)}", file=sys.stderr, flush=True)

    def run(
        self, measure: Callable[[], dict[str, Any]], retries: int = 2, wait: float = 60
    ) -> dict[str, Any]:
        """The result of ``measure``, with ``spins`` (seconds before and after) and ``others`` (cores that other processes kept busy).

        Args:
            measure: Runs in other processes.
            retries: How often it is repeated if the machine was busy.
            wait: Seconds to wait for a quiet machine before each time.
        """
        result: dict[str, Any] = {}
        for _ in range(1 + retries):
            before, watch = quiet.wait(verdict.SLOWER * self.best_spin, wait), quiet.Watch()
            result = measure()
            others = watch.others()
            result |= {"spins": [before, quiet.spin()], "others": others}
            self.best_spin = min(self.best_spin, *result["spins"])
            if verdict.not_quiet(result["spins"], others, self.best_spin) is None:
                break
        return result

    def disturbed(self, run: dict[str, Any]) -> str | None:
        """Why a result of ``run`` must not be trusted, as a sentence, or ``None``."""
        return verdict.not_quiet(run["spins"], run["others"], self.best_spin)
