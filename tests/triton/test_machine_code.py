"""The machine code of every kernel the dispatcher can choose: no spill, tensor cores, wide loads, enough bytes in flight."""

import functools
import itertools

import pytest
from compiler import machine_code
from markers import slow_if

from lab.aot import ARCHS
from lab.inventory import OPS

SCRIPT = """
import json, torch
from lab import aot, inventory
rows = []
for arch, rank, sizes, mixed in {targets}:
    found = inventory.launches(
        {op!r}, arch, ranks=(rank,), sizes=(getattr(inventory, sizes),), mixed=mixed
    )
    rows += [report.row() for report in aot.inspect_launches(found, arch)]
print(json.dumps(rows))
"""


ODD_OPS = {"lora_linear", "lora_swiglu_mlp", "linear_cross_entropy", "grouped_lora"}
"""With the passes that most ops are made of; all of them are in ``test_every_target``."""

DECODING_OPS = {"nf4", "quantized_linear"}
"""The instructions of these are counted on both targets."""


SLOW_OPS = {
    "lora_swiglu_mlp",
    "int8_compute_linear",
    "grouped_lora",
    "lora_qkv",
    "linear_cross_entropy",
    "bottleneck",
    "frozen_norm",
}
"""Ops with many kernels, or with those of ``lora_linear``; ``make slow`` compiles them."""


def problems(rows):
    return [
        f"{row['arch']} {row['kernel']} {row['config']}: {problem}"
        for row in rows
        for problem in row["problems"]
    ]


def aligned_rows(op):
    return [row for row in quick_rows(op) if row["aligned"]]


@functools.cache
def quick_rows(op):
    targets = [("cuda:90", 16, "EVEN", True)]
    targets += [("cuda:80", 64, "EVEN", False)] * (op in DECODING_OPS)
    targets += [("cuda:80", 8, "ODD", False)] * (op in ODD_OPS)
    return machine_code(SCRIPT.format(targets=targets, op=op))


@pytest.mark.parametrize("op", slow_if(SLOW_OPS.__contains__, OPS))
def test_quick_set(op):
    """bfloat16 at rank 16 for H100, with bfloat16 and float32 factors. ``test_every_target`` has the other ranks and targets.

    Some ops also run for A100: at rank 8 and sizes that 16 does not divide, or because they decode a weight.
    """
    rows = quick_rows(op)
    assert {row["arch"] for row in rows} == {
        "cuda:90",
        *(["cuda:80"] if op in ODD_OPS | DECODING_OPS else []),
    }
    if op in ODD_OPS:
        assert {row["aligned"] for row in rows} == {True, False}
    assert problems(rows) == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", OPS)
def test_every_target(op, arch):
    """bfloat16 at ranks 8, 16 and 64 and all sizes; every dtype and rank there is: `make kernels ARGS="inspect --all"`."""
    kinds = itertools.product((8, 16, 64), ("EVEN", "ODD_ROWS", "ODD"))
    targets = [(arch, rank, sizes, True) for rank, sizes in kinds]
    rows = machine_code(SCRIPT.format(targets=targets, op=op))
    assert {row["arch"] for row in rows} == {arch}
    assert problems(rows) == []


RANK_8 = """
import json
from lab import aot, inventory
found = inventory.launches("lora_linear", "cuda:90", ranks=(8,), sizes=inventory.SIZES[:2], mixed=False)
print(json.dumps([report.row() for report in aot.inspect_launches(found, "cuda:90")]))
"""


@pytest.mark.slow
def test_rows_of_8_ranks_are_read_as_fast_as_those_of_16():
    """PEFT's default: 8 elements are the 128 bits of an access, which a kernel has to tell the compiler (``tiles.assume_multiple_of``)."""
    rows = machine_code(RANK_8)
    assert problems(rows) == []
    passes = [row for row in rows if row["kernel"] in ("shrink_kernel", "tall_kernel")]
    assert {"WITH_P=True", "DROPOUT=True"} <= {w for row in passes for w in row["config"].split()}
    assert not any("16" in row["load_widths"] for row in passes), passes


NF4_INSTRUCTIONS = {
    ("NESTED=False", "HAS_SCALE=False"): 9.5,
    ("NESTED=True", "HAS_SCALE=False"): 10.5,
    ("NESTED=False", "HAS_SCALE=True"): 14.0,
    ("NESTED=True", "HAS_SCALE=True"): 15.5,
}
"""An element. A100 and H100 issue 24 and 21 in the time its 2.5 bytes take."""


def test_decoding_nf4_is_cheap():
    found = [row for row in aligned_rows("nf4") if row["kernel"] == "dequantize_kernel"]
    assert len(found) == 2 * len(NF4_INSTRUCTIONS)
    for row in found:
        words = row["config"].split()
        (limit,) = (n for flags, n in NF4_INSTRUCTIONS.items() if set(flags) <= set(words))
        assert {"BLOCK=512", "warps=4"} <= set(words)
        assert row["instructions"] / (512 * 8 / 128) <= limit, row
        # only the codes of nested maxima are bytes
        assert "NESTED=True" in words or set(row["load_widths"]) == {"32"}, row


def test_packed_codes_are_stored_in_words():
    found = [row for row in aligned_rows("nf4") if row["kernel"] == "quantize_kernel"]
    assert len(found) == 16
    assert not any("8" in row["store_widths"] for row in found)


def test_decoding_nf4_inside_a_product_is_cheap():
    """11.5 clocks a weight and lane at 16 rows (nested 12.5): about half of DRAM bandwidth on A100 and H100, and it says so."""
    rows = aligned_rows("quantized_linear")
    small = [row for row in rows if row["kernel"] == "nf4_small_m_kernel"]
    tiles = [row for row in small if "BLOCK_M=16" in row["config"]]
    assert len(tiles) == 10
    for row in tiles:
        assert "BLOCK_N=64 BLOCK_K=64" in row["config"]
        assert "warps=4" in row["config"]
        weights = 64 * 64 / (4 * 32)
        assert row["loop_clocks"] / weights <= (12.5 if "NESTED=True" in row["config"] else 11.5)
