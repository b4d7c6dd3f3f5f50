"""Whether a measured step may be shown: a speed is refused if the result was wrong or the conditions were bad.

A refused row is kept with its reason. The functions here take numbers alone.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from typing import Any

LOSS_TOLERANCE = 1e-5
"""Largest relative difference of a loss from the reference's in float32: about a hundred roundings, as two orders of summation give."""

ROUNDED_TOLERANCE = 0.01
"""The same if values are rounded more coarsely than in the reference: 8-bit products, or 16-bit weights, whose rounding is 2⁻⁸."""

SLOWER = 1.15
"""How much longer than the best a fixed amount of work may take on a quiet machine.

The limit must lie between two numbers. Below it: the variation on an idle machine, which ``python benchmarks/quiet.py`` prints and the
suite measures when it starts (1.04 to 1.05 x on an idle AMD EPYC with two cores); a clock that falls under load counts too.
Above it: one more busy process on one of ``n`` cores. The
system moves it from core to core, so ``n`` threads share with it, and the work takes ``(n + 1) / n`` to 2 times as long: 1.5 or more on two
cores, but 1.06 on sixteen. There ``OTHERS`` finds it.
"""

OTHERS = 0.10
"""How many cores other processes may keep busy. The system's own work is below this on a quiet machine, and a busy process takes 1."""


def of_calibration(spread: float) -> str:
    """What follows from the variation of the fixed work at the start, as the end of a sentence."""
    if spread <= SLOWER:
        return f"; the limit is {SLOWER} x"
    return (
        f". The machine is not quiet: the limit is {SLOWER} x, and runs that exceed it are repeated (--retries) after a pause "
        "(--wait), then refused"
    )


def last_words(stderr: str, status: int) -> str:
    """The line that says best why a process failed: the last one that names an exception, else the last one."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    named = [line for line in lines if _EXCEPTION.match(line)]
    return (named or lines or [f"exit status {status}"])[-1][:300]


_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b")


def refusal(
    runs: Sequence[dict[str, Any]],
    reference: Sequence[float],
    expected_trainable: int | None,
    best_spin: float,
    tolerance: float,
) -> str | None:
    """Why a provider's runs must not be shown as a speed, as a sentence, or ``None`` if they may.

    Args:
        runs: As ``suite_row.py`` prints them, each with ``spins`` (seconds before and after) and ``others`` (cores).
        reference: The losses of the method's reference.
        expected_trainable: The number of parameters that the reference trains; ``None`` if the number is free.
        best_spin: The shortest spin of the suite, in seconds.
        tolerance: Largest relative difference of a loss.
    """
    checks = [
        *(wrong_losses(run["losses"], reference, tolerance) for run in runs),
        *(wrong_gradients(run, expected_trainable) for run in runs),
        # a busy machine looks like a warm-up too, so it is named first
        *(not_quiet(run["spins"], run["others"], best_spin) for run in runs),
        *(warming_up(run["seconds"]) for run in runs),
    ]
    return next((reason for reason in checks if reason), None)


def wrong_losses(
    losses: Sequence[float], reference: Sequence[float], tolerance: float
) -> str | None:
    """The first step at which the losses differ from the reference."""
    if len(losses) != len(reference) or not losses:
        return f"it has {len(losses)} losses, its reference {len(reference)}"
    for step, (loss, wanted) in enumerate(zip(losses, reference, strict=True)):
        if not (math.isfinite(loss) and abs(loss - wanted) <= tolerance * abs(wanted)):
            return f"loss {loss:.7g} at step {step}, the reference has {wanted:.7g}"
    return None


def wrong_gradients(run: dict[str, Any], expected_trainable: int | None) -> str | None:
    """A tensor without the gradient that it must have, or with one that it must not have."""
    for key, what in (
        ("without_gradient", "gets no gradient, although the method trains it"),
        ("leaking", "gets a gradient, although it is frozen"),
    ):
        if run[key]:
            more = f" and {len(run[key]) - 1} more" if len(run[key]) > 1 else ""
            return f"{run[key][0]}{more} {what}"
    if expected_trainable is not None and run["trainable"] != expected_trainable:
        return f"it trains {run['trainable']:,} parameters, the reference {expected_trainable:,}"
    return None


def warming_up(seconds: Sequence[float]) -> str | None:
    """Whether the steps were still getting faster: the first half took longer than the second by more than a quiet machine varies."""
    if len(seconds) < 2:
        return f"{len(seconds)} timed steps do not show whether the warm-up is over; use 2 or more"
    half = len(seconds) // 2
    first, second = statistics.median(seconds[:half]), statistics.median(seconds[-half:])
    if first > SLOWER * second:
        return (
            f"it was still warming up: the first steps took {first:.3g} s, the last {second:.3g} s"
        )
    return None


def not_quiet(spins: Sequence[float], others: float | None, best_spin: float) -> str | None:
    """Whether the machine was busy with other work before, during or after a run."""
    if max(spins) > SLOWER * best_spin:
        return f"the machine was busy: a fixed amount of work took {max(spins) / best_spin:.2f} x as long as at best"
    if others is not None and others > OTHERS:
        return f"the machine was busy: other processes kept {others:.2f} cores busy"
    return None
