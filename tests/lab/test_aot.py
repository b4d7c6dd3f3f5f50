"""The machine-code inspector: real targets, and each kind of fault found."""

from collections import Counter

import pytest
from compiler import machine_code

from lab.machine_code import Report

SCRIPT = """
import json, torch, lab_kernels as kernels
from lab.aot import inspect_launches
from peftkit_kernels.core.launch import Target, launch, recording

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")

def matmul(
    blocks, dtype=torch.bfloat16, precision="ieee", warps=4, stages=3, K=4096, offset=0, used=None
):
    x, w = meta(8192, K + offset, dtype=dtype)[:, offset:], meta(4096, K, dtype=dtype)
    y = meta(8192, 4096, dtype=dtype)
    m, n, k = blocks
    launch(kernels.matmul_nt, (1, 1), x, w, y, 8192, 4096, used or K, x.stride(0), K, 4096,
           BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, PRECISION=precision, num_warps=warps, num_stages=stages)

def report(arch, *cases):
    with recording(Target(arch, 108)) as launches:
        for options in cases:
            matmul(**options)
    return [r.row() | {"loops": len(r.loops), "dots": r.dots} for r in inspect_launches(launches, arch)]

good = dict(blocks=(64, 64, 32))
result = {arch: report(arch, good, good) for arch in ("cuda:80", "cuda:90", "hip:gfx942")}
result["spills"] = report("cuda:80", dict(blocks=(128, 256, 32), dtype=torch.float32, precision="tf32"))
result["no tensor core"] = report("cuda:75", dict(blocks=(32, 32, 32), dtype=torch.float16))
result["float32"] = report("cuda:80", dict(blocks=(32, 32, 32), dtype=torch.float32))
result["narrow"] = report("cuda:80", dict(blocks=(64, 64, 32), used=4095))
result["odd"] = report("cuda:80", dict(blocks=(64, 64, 32), K=4095))
result["starts anywhere"] = report("cuda:80", dict(blocks=(64, 64, 32), K=4080, offset=16 + 1))
result["shared"] = report("cuda:86", dict(blocks=(128, 128, 128), warps=8, stages=3))
result["rejected"] = report("cuda:80", dict(blocks=(64, 64, 8)))
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def reports():
    """Every case of ``SCRIPT``, compiled by one child."""
    return machine_code(SCRIPT)


@pytest.mark.parametrize(
    ("arch", "instruction"), [("cuda:80", "HMMA"), ("cuda:90", "HGMMA"), ("hip:gfx942", "MFMA")]
)
def test_a_good_kernel_has_no_problem(reports, arch, instruction):
    (row,) = reports[arch]  # launched twice, compiled once
    assert row["problems"] == []
    assert row["kernel"] == "matmul_nt"
    assert "*bf16 BLOCK_M=64 BLOCK_N=64 BLOCK_K=32 PRECISION=ieee warps=4" in row["config"]
    assert list(row["tensor_instructions"]) == [instruction]
    assert row["dots"] == 1
    assert row["load_widths"]["128"] > 0
    assert 20 < row["registers"] < 256
    assert row["spills"] == row["stack"] == 0
    assert row["shared_bytes"] > 0
    if arch.startswith("cuda"):
        assert row["loops"] >= 1
        assert 0 < row["occupancy"] <= 1


@pytest.mark.parametrize("case", ["odd", "starts anywhere"])
def test_rows_that_can_only_be_read_by_elements_may_be(reports, case):
    (row,) = reports[case]
    assert not row["aligned"]
    assert "16" in row["load_widths"]
    assert row["problems"] == []


def test_a_loop_that_waits_is_none():
    """On sm_100 a product is waited for in one; a kernel that streams nothing else may read little and write much."""
    found = Report("expand_kernel", "", "cuda:100", registers=64, shared_bytes=1024, warps=4)
    found.loads, found.stores = Counter({"16": 24}), Counter({"128": 8})
    found.loops = [Counter(SYNCS=1, BRA=1)]
    (problem,) = found.problems()
    assert "has no 128-bit access" in problem
    found.has_loop = False
    assert found.problems() == []


def test_exact_float32_products_need_no_tensor_core(reports):
    (row,) = reports["float32"]
    assert row["dots"] == 0
    assert row["problems"] == []


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        ("spills", "spills: "),
        ("no tensor core", "has 1 dots and no tensor-core instruction"),
        ("narrow", "has no 128-bit access, only {'16': "),
        ("shared", "bytes of shared memory, more than a block has"),
        ("rejected", "does not compile: "),
    ],
)
def test_each_fault_is_named(reports, case, problem):
    (row,) = reports[case]
    assert any(problem in found for found in row["problems"]), row


def stream_report(kernel, dropout=False, act="silu", clocks=1):
    """A kernel on an H100 with one loop of ``clocks`` instructions an element, as the inspector would report it."""
    tile = {"BLOCK_M": 64, "BLOCK_F": 32, "BLOCK_D": 32, "BLOCK_R": 16}
    found = Report(kernel, "", "cuda:90", registers=64, shared_bytes=1024, warps=4)
    found.constants = tile | {"DROPOUT": dropout, "ACT": act}
    found.loads = Counter({"128": 1})
    found.loops = [Counter({"FFMA": clocks * 16})]
    return found


def test_a_kernel_that_says_it_is_bound_by_instructions_may_be():
    slow = stream_report("gate_forward_kernel", dropout=True, act="gelu", clocks=60)
    assert slow.dram_margin < 1
    assert slow.problems() == []
    for dropout, act in ((False, "gelu"), (True, "silu")):
        (problem,) = stream_report("gate_forward_kernel", dropout, act, clocks=60).problems()
        assert "instruction-bound" in problem


def test_streams_spread_over_two_loops_are_timed_together():
    one, two = (stream_report("bottleneck_forward_kernel", clocks=10) for _ in range(2))
    two.loops = two.loops * 2
    assert one.dram_margin == 2 * two.dram_margin
    # the tile of rows and that of a factor
    assert one.bytes_in_flight == one.occupancy.blocks * 2 * (64 * 32 + 32 * 16)
