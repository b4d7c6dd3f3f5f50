"""The machine code of every kernel the dispatcher can choose: no spill, tensor cores, wide loads, enough bytes in flight."""

import pytest
from compiler import machine_code

from peftkit_kernels.lab.inventory import OPS

SCRIPT = """
import json, torch
from peftkit_kernels.lab import aot, inventory
rows = []
for arch in aot.{archs}:
    found = inventory.launches({op!r}, arch, {options})
    rows += [report.row() for report in aot.inspect_launches(found, arch)]
print(json.dumps(rows))
"""


def problems(rows):
    return [
        f"{row['arch']} {row['kernel']} {row['config']}: {problem}"
        for row in rows
        for problem in row["problems"]
    ]


@pytest.mark.parametrize("op", OPS)
def test_quick_set(op):
    """Ranks 16 and 64 in bfloat16, for A100 and H100."""
    rows = machine_code(SCRIPT.format(archs="QUICK_ARCHS", op=op, options=""))
    assert {row["arch"] for row in rows} == {"cuda:80", "cuda:90"}
    assert problems(rows) == []


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_full_set(op):
    """Every rank and dtype, for every target."""
    options = "ranks=inventory.RANKS, dtypes=inventory.DTYPES"
    rows = machine_code(SCRIPT.format(archs="ARCHS", op=op, options=options))
    assert len({row["arch"] for row in rows}) == 7
    assert problems(rows) == []
