"""Bytes of every launch of an op, measured in the interpreter, and for comparison those by the rule of ``predict`` and of eager torch."""

from __future__ import annotations

from typing import Any

import torch

from lab.case import Case, Sizes, step
from lab.cases import OPERATIONS, build, chosen
from lab.eager import EagerTraffic
from lab.interp import faithful
from lab.inventory import OPS
from lab.predict import WORK, Work, moved_bytes
from lab.traffic import Launch, Traffic

SIZES = Sizes(M=192, K=256, N=512)
"""Rows are multiples of 32 bytes and there are several tiles; small enough for the interpreter."""
FEW_ROWS = {"linear_cross_entropy": Sizes(M=24, K=64, N=1024)}
"""Fewer rows for an op in which every row is a program."""


def rows(ops: list[str] | None = None) -> list[dict[str, Any]]:
    """A row for every launch, one for all ops of the library, and one for the sum, which also has ``eager_bytes``.

    ``formula_bytes`` are the bytes of a launch by the rule of the predictions, which counts each argument once. ``as_formula``
    says whether the measured bytes equal them or, if they depend on the data, do not exceed them.

    Args:
        ops: Keys of ``inventory.OPS``; ``None`` means all.
    """
    found = []
    for op in chosen(ops, OPS):
        for variant in OPERATIONS[op].variants:
            sizes = FEW_ROWS.get(op, SIZES)
            found += _measure(variant, build(op, variant, sizes, dtype=torch.bfloat16))
    return found


def _measure(name: str, case: Case) -> list[dict[str, Any]]:
    with Traffic() as traffic, EagerTraffic() as torch_ops, faithful():
        case.run("triton")
    with EagerTraffic() as eager:
        step(case.eager, case.leaves)
    found = [_row(name, launch) for launch in traffic.check().launches]
    library = torch_ops.unique_bytes
    sums = {
        key: library + sum(row[key] for row in found)
        for key in ("unique_bytes", "requested_bytes", "sector_bytes", "formula_bytes")
    }
    calls = {"op": name, "kernel": f"{len(torch_ops.ops)} torch ops"}
    rest = {"eager_bytes": None, "as_formula": True}
    total = {
        "eager_bytes": eager.unique_bytes,
        "as_formula": all(row["as_formula"] for row in found),
    }
    return [
        *found,
        calls | dict.fromkeys(sums, library) | rest,
        {"op": name, "kernel": "sum"} | sums | total,
    ]


def _row(name: str, launch: Launch) -> dict[str, Any]:
    unique, formula = launch.total("unique_bytes"), moved_bytes(launch.kernel, launch.values)
    bounded = WORK.get(launch.kernel, Work()).bounded
    return {
        "op": name,
        "kernel": launch.kernel,
        "unique_bytes": unique,
        "requested_bytes": launch.total("requested_bytes"),
        "sector_bytes": launch.total("sector_bytes"),
        "formula_bytes": formula,
        "eager_bytes": None,
        "as_formula": unique == formula or (bounded and unique < formula),
    }
