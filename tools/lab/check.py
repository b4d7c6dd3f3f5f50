"""Run the Triton kernels of every op in the faithful interpreter and compare them with the definition in float64.

The error of a result may be a few times that of plain torch in the same dtype, plus one rounding. Every launch is checked for
races and accesses out of bounds, and offsets for int32 overflow. New memory is filled with NaN, and a second run with the
programs in reverse order must give the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from lab.case import Case, Sizes
from lab.cases import FACTOR, OPERATIONS, build, chosen
from lab.interp import faithful
from lab.inventory import OPS
from lab.testing import error_and_allowed
from lab.traffic import Traffic
from peftkit_kernels.core import plan

SIZES = Sizes(M=70, K=72, N=88, R=8, p=0.1)
"""More than one tile of rows; no size is a multiple of a tile."""
FEW_ROWS = {"linear_cross_entropy": Sizes(M=24, K=40, N=230, R=8)}
"""Fewer rows for an op in which every row is a program."""
INT32_LIMIT = 5000
"""Row offsets of these tensors exceed it if they are int32; offsets within a row or of a small factor do not."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rows(ops: list[str] | None = None) -> list[dict[str, Any]]:
    """One row for every op, variant and dtype; ``problems`` is empty if none was found.

    Args:
        ops: Keys of ``inventory.OPS``; ``None`` means all.
    """
    found = []
    for op in chosen(ops, OPS):
        for variant in OPERATIONS[op].variants:
            for dtype in DTYPES:
                case = build(op, variant, FEW_ROWS.get(op, SIZES), dtype=dtype)
                found.append(
                    {"op": variant, "dtype": str(dtype).removeprefix("torch."), **_check(case)}
                )
    return found


def _check(case: Case) -> dict[str, Any]:
    plan.clear()  # the schedule itself runs first, then its replay
    case = dataclasses.replace(case, call=case.by_rows or case.call)
    truth = case.to(torch.float64).run("reference")
    plain = case.run("reference")
    problems = []
    with nan_in_new_memory(), Traffic() as traffic, faithful(int32_limit=INT32_LIMIT):
        try:
            actual = case.run("triton")
        except Exception as error:  # a broken kernel may raise any error, and the row reports it
            actual, problems = {}, [f"{type(error).__name__}: {error}"]
    for launch in traffic.launches:
        problems += [
            f"{launch.kernel}: {f.kind} on {f.argument}: {f.message}" for f in launch.findings
        ]
    if not traffic.launches:
        problems.append("no kernel was launched")
    worst, where = 0.0, ""
    for name, value in actual.items():
        error, allowed = error_and_allowed(value, plain[name], truth[name], FACTOR)
        ratio = error / allowed if allowed else float(error > 0)
        if not ratio <= 1:
            problems.append(f"{name} has an error of {error:.3g}, allowed are {allowed:.3g}")
        if not ratio <= worst:
            worst, where = ratio, name
    if not problems:
        with faithful(order="reverse"):
            again = case.run("triton")
        changed = [name for name, value in actual.items() if not torch.equal(value, again[name])]
        problems += [f"{name} depends on the order of the programs" for name in changed]
    return {
        "launches": len(traffic.launches),
        "compared": len(actual),
        "worst": where,
        "error_over_allowed": round(worst, 3) if worst == worst else None,
        "problems": problems,
    }


@contextlib.contextmanager
def nan_in_new_memory() -> Iterator[None]:
    """A context in which new memory is filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
