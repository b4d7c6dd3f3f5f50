"""Data-sheet numbers of GPUs, theoretical occupancy and roofline times."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

KIB = 1024


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU as its data sheet describes it.

    Attributes:
        name: Marketing name.
        arch: Target of the compiler, ``"cuda:90"``.
        sms: Streaming multiprocessors.
        clock_ghz: Boost clock under load.
        tensor_tflops: Dense 16-bit tensor-core rate with float32 accumulation.
        bandwidth_gbs: DRAM bandwidth, in 10^9 bytes per second.
        l2_mib: Usable L2 cache.
        gemm_efficiency: Share of ``tensor_tflops`` that a well-tuned library GEMM reaches.
        triton_efficiency: Share of the library's rate that a pointer-based Triton GEMM reaches.
        bandwidth_efficiency: Share of ``bandwidth_gbs`` that a streaming kernel reaches.
    """

    name: str
    arch: str
    sms: int
    clock_ghz: float
    tensor_tflops: float
    bandwidth_gbs: float
    l2_mib: float
    gemm_efficiency: float
    triton_efficiency: float
    bandwidth_efficiency: float = 0.90

    @property
    def bytes_per_second(self) -> float:
        """The DRAM bandwidth that a streaming kernel reaches."""
        return self.bandwidth_gbs * 1e9 * self.bandwidth_efficiency


A100 = Device("A100", "cuda:80", 108, 1.41, 312, 2039, 40, 0.83, 0.95)
H100 = Device("H100", "cuda:90", 132, 1.70, 989, 3350, 50, 0.68, 0.88)
RTX4090 = Device("RTX 4090", "cuda:89", 128, 2.52, 165, 1008, 72, 0.92, 0.97)
DEVICES = (A100, H100, RTX4090)


class Limits(NamedTuple):
    """The most that one streaming multiprocessor holds."""

    warps: int
    blocks: int
    shared_bytes: int
    shared_bytes_per_block: int


LIMITS = {
    "cuda:75": Limits(32, 16, 64 * KIB, 64 * KIB),
    "cuda:80": Limits(64, 32, 164 * KIB, 163 * KIB),
    "cuda:86": Limits(48, 16, 100 * KIB, 99 * KIB),
    "cuda:89": Limits(48, 24, 100 * KIB, 99 * KIB),
    "cuda:90": Limits(64, 32, 228 * KIB, 227 * KIB),
    "cuda:100": Limits(64, 32, 228 * KIB, 227 * KIB),
    "cuda:103": Limits(64, 32, 228 * KIB, 227 * KIB),
    "cuda:120": Limits(48, 24, 100 * KIB, 99 * KIB),
}
"""CUDA C++ Programming Guide, table of technical specifications per compute capability."""

_REGISTERS = 65536
_REGISTER_UNIT = 256
"""Registers are allocated per warp in multiples of this number."""


class Occupancy(NamedTuple):
    """Blocks that fit on one multiprocessor, their share of the largest number of warps, and the resource that limits them."""

    blocks: int
    fraction: float
    limit: str


def occupancy(arch: str, registers: int, warps: int, shared_bytes: int) -> Occupancy:
    """Resident blocks of a kernel; none if it needs more shared memory than a block may have.

    Args:
        arch: A key of ``LIMITS``.
        registers: Registers of a thread.
        warps: Warps of a block.
        shared_bytes: Shared memory of a block.
    """
    limits = LIMITS[arch]
    per_warp = math.ceil(max(registers, 1) * 32 / _REGISTER_UNIT) * _REGISTER_UNIT
    reserved = 0 if arch == "cuda:75" else KIB  # the system reserves this much in every block
    fits = {
        "registers": _REGISTERS // per_warp // warps,
        "shared memory": limits.shared_bytes // max(shared_bytes + reserved, 1),
        "blocks": limits.blocks,
        "warps": limits.warps // warps,
    }
    limit = min(fits, key=lambda name: fits[name])
    blocks = 0 if shared_bytes > limits.shared_bytes_per_block else fits[limit]
    return Occupancy(blocks, blocks * warps / limits.warps, limit)


def roofline_seconds(
    device: Device, flops: float, dram_bytes: float, *, triton_gemm: bool = False
) -> float:
    """Time of one kernel: the longer of the times for its products and for its bytes."""
    rate = device.tensor_tflops * 1e12 * device.gemm_efficiency
    if triton_gemm:
        rate *= device.triton_efficiency
    return max(flops / rate, dram_bytes / device.bytes_per_second)
