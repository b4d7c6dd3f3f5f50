"""Occupancy, rooflines, the L2 model and the reading of machine code, against published numbers and by hand."""

from collections import Counter

import pytest

from lab.devices import A100, DEVICES, H100, LIMITS, occupancy, roofline_seconds
from lab.l2sim import Tiling, gemm_volume, grouped


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "expected"),
    [
        ("cuda:80", 32, 4, 0, (16, 1.0, "registers")),
        ("cuda:80", 255, 8, 0, (1, 8 / 64, "registers")),
        ("cuda:80", 40, 4, 80 * 1024, (2, 8 / 64, "shared memory")),
        ("cuda:86", 16, 1, 0, (16, 16 / 48, "blocks")),
        ("cuda:90", 32, 32, 0, (2, 1.0, "registers")),
        ("cuda:86", 40, 4, 99 * 1024 + 1, (0, 0.0, "shared memory")),
    ],
)
def test_occupancy(arch, registers, warps, shared, expected):
    assert tuple(occupancy(arch, registers, warps, shared)) == expected


def test_a_kernel_is_as_slow_as_the_slower_of_bytes_and_products():
    streaming = roofline_seconds(H100, 0.0, 3350e9)
    assert streaming == pytest.approx(1 / 0.9)
    assert roofline_seconds(A100, 312e12, 1.0) == pytest.approx(1 / 0.83)
    assert roofline_seconds(A100, 312e12, 1.0, triton_gemm=True) == pytest.approx(1 / 0.83 / 0.95)
    assert {device.arch for device in DEVICES} <= LIMITS.keys()


def test_groups_of_tiles_cover_the_grid_once():
    tiles = {grouped(p, 5, 7, 2) for p in range(35)}
    assert tiles == {(m, n) for m in range(5) for n in range(7)}
    assert [grouped(p, 5, 7, 2) for p in range(3)] == [(0, 0), (1, 0), (0, 1)]


def test_a_gemm_that_fits_the_cache_moves_each_byte_once():
    volume = gemm_volume(512, 384, 256)
    assert volume.read_bytes == 2 * (512 * 256 + 384 * 256)
    assert volume.written_bytes == 2 * 512 * 384
    added = gemm_volume(512, 384, 256, accumulates=True)
    assert added.read_bytes == volume.read_bytes + volume.written_bytes
    small = gemm_volume(512, 384, 256, l2_mib=0.01, tiling=Tiling(programs=1))
    assert small.read_bytes > 2 * volume.read_bytes


@pytest.mark.parametrize(
    ("width", "eager_gib", "fused_gib"),
    [(4096, 2.008, 1.258), (5120, 2.771, 1.836), (8192, 5.289, 4.044)],
)
def test_published_dram_volumes_of_lora_layers(width, eager_gib, fused_gib):
    """Profiler volumes (H100, 8192 rows, rank 16, dropout, forward and backward) published with LoRAFusion."""
    x, mask = 8192 * width * 2, 8192 * width
    gemms = 2 * gemm_volume(8192, width, width).total_bytes
    eager = gemms + (2 * x + mask) + 2 * x + 5 * x + 6 * x + (2 * x + mask) + 3 * x
    fused = gemms + (2 * x + mask) + x + 2 * x + mask
    assert eager / 2**30 == pytest.approx(eager_gib, rel=0.08)
    assert fused / 2**30 == pytest.approx(fused_gib, rel=0.08)


DISASSEMBLY = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/              @!P0 LDGSTS.E.BYPASS.128 [R7], [R2.64] ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0040*/                   MUFU.EX2 R5, R5 ;
        /*0050*/               @P1 BRA 0x30 ;
        /*0060*/                   STL [R1], R4 ;
        /*0070*/                   LDG.E.U16 R4, [R2.64] ;
        /*0080*/                   STG.E.64 [R2.64], R4 ;
        /*0090*/                   BRA 0x10 ;
"""


def test_machine_code_is_counted():
    from lab.machine_code import (
        Report,
        clocks,
        dram_margin,
        read_amd,
        read_sass,
    )

    report = Report("kernel", "", "cuda:80", warps=4, registers=40)
    read_sass(report, DISASSEMBLY)
    assert report.loads == {"128": 2, "16": 1}
    assert report.stores == {"64": 1}
    assert report.spills == 1
    assert report.tensor_instructions == {"HMMA": 1}
    assert report.loops == [{"HMMA": 1, "MUFU": 1, "BRA": 1}]
    assert clocks(report.loops[0]) == (8, "special")
    assert clocks(Counter(LDS=3, FFMA=1)) == (12, "memory")
    assert clocks(Counter(LOP3=3, FFMA=2)) == (6, "alu")
    assert clocks(Counter(FFMA=5)) == (5, "issue")
    # 128 lanes, 16 elements in 8 clocks: 256 elements of 2 bytes a clock and multiprocessor
    margin = dram_margin(report.loops[0], A100, 16, 2)
    assert margin == pytest.approx(256 * 2 * 108 * 1.41 / 2039)

    amd = Report("kernel", "", "hip:gfx942")
    read_amd(
        amd,
        ".vgpr_count:     70\n.vgpr_spill_count: 3\n.private_segment_fixed_size: 12\n"
        "\tglobal_load_dwordx4 v[0:3]\n\tv_mfma_f32_16x16\n\tglobal_store_dwordx2 v[0:1]\n",
    )
    assert (amd.registers, amd.spills, amd.stack_bytes) == (70, 3, 12)
    assert (amd.loads, amd.stores) == ({"128": 1}, {"64": 1})
    assert amd.tensor_instructions == {"MFMA": 1}
