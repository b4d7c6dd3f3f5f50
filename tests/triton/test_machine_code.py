"""The machine code of every kernel the dispatcher can choose: no spill, tensor cores, wide loads, enough bytes in flight."""

import functools

import pytest
from compiler import machine_code

from peftkit_kernels.lab.aot import ARCHS
from peftkit_kernels.lab.inventory import OPS

SCRIPT = """
import json, torch
from peftkit_kernels.lab import aot, inventory
rows = []
for arch, ranks in {targets}:
    found = inventory.launches({op!r}, arch, ranks=ranks, {options})
    rows += [report.row() for report in aot.inspect_launches(found, arch)]
print(json.dumps(rows))
"""


def problems(rows):
    return [
        f"{row['arch']} {row['kernel']} {row['config']}: {problem}"
        for row in rows
        for problem in row["problems"]
    ]


@functools.cache
def quick_rows(op):
    targets = '[("cuda:80", (16,)), ("cuda:90", (64,))]'
    return machine_code(SCRIPT.format(targets=targets, op=op, options=""))


@pytest.mark.parametrize("op", OPS)
def test_quick_set(op):
    """bfloat16, rank 16 for A100 and rank 64 for H100: every kernel on both, and both ranks, in half the time."""
    rows = quick_rows(op)
    assert {row["arch"] for row in rows} == {"cuda:80", "cuda:90"}
    assert problems(rows) == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", OPS)
def test_every_target(op, arch):
    """bfloat16 at ranks 16 and 64; every dtype and rank there is: `peftkit kernels inspect --all`."""
    rows = machine_code(SCRIPT.format(targets=[(arch, (16, 64))], op=op, options=""))
    assert {row["arch"] for row in rows} == {arch}
    assert problems(rows) == []


TALL_AT_RANK_8 = """
import json
from peftkit_kernels.lab import aot, inventory
found = inventory.launches("lora_linear", "cuda:80", ranks=(8,))
found = [launch for launch in found if launch.kernel.__name__ == "tall_kernel"]
print(json.dumps([report.row() for report in aot.inspect_launches(found, "cuda:80")]))
"""


def test_rows_that_16_does_not_divide_do_not_spill():
    """Rank 8: such rows of s and B are read by elements, whose addresses take registers."""
    rows = machine_code(TALL_AT_RANK_8)
    words = {word for row in rows for word in row["config"].split()}
    assert {"WITH_P=True", "DROPOUT=True"} <= words
    assert problems(rows) == []


NF4_INSTRUCTIONS = {
    ("NESTED=False", "HAS_SCALE=False"): 9.5,
    ("NESTED=True", "HAS_SCALE=False"): 10.5,
    ("NESTED=False", "HAS_SCALE=True"): 14.0,
    ("NESTED=True", "HAS_SCALE=True"): 15.5,
}
"""An element. A100 and H100 issue 24 and 21 in the time its 2.5 bytes take."""


def test_decoding_nf4_is_cheap():
    found = [row for row in quick_rows("nf4") if row["kernel"] == "dequantize_kernel"]
    assert len(found) == 2 * len(NF4_INSTRUCTIONS)
    for row in found:
        words = row["config"].split()
        (limit,) = (n for flags, n in NF4_INSTRUCTIONS.items() if set(flags) <= set(words))
        assert {"BLOCK=512", "warps=4"} <= set(words)
        assert row["instructions"] / (512 * 8 / 128) <= limit, row
        # only the codes of nested maxima are bytes
        assert "NESTED=True" in words or set(row["load_widths"]) == {"32"}, row


def test_packed_codes_are_stored_in_words():
    found = [row for row in quick_rows("nf4") if row["kernel"] == "quantize_kernel"]
    assert len(found) == 16
    assert not any("8" in row["store_widths"] for row in found)


def test_decoding_nf4_inside_a_product_is_cheap():
    """11.5 clocks a weight and lane at 16 rows (nested 12.5): about half of DRAM bandwidth on A100 and H100, and it says so."""
    rows = quick_rows("quantized_linear")
    small = [row for row in rows if row["kernel"] == "nf4_small_m_kernel"]
    tiles = [row for row in small if "BLOCK_M=16" in row["config"]]
    assert len(tiles) == 8
    for row in tiles:
        assert "BLOCK_N=64 BLOCK_K=64" in row["config"]
        assert "warps=4" in row["config"]
        weights = 64 * 64 / (4 * 32)
        assert row["loop_clocks"] / weights <= (12.5 if "NESTED=True" in row["config"] else 11.5)
