"""Launch configuration of the adapter, chosen by a pure function of numbers; the machine-code tests compile each one."""

from __future__ import annotations

from dataclasses import dataclass

from peftkit_kernels.launch import Target, cdiv
from peftkit_kernels.low_rank.config import block_r

MAX_BOTTLENECK = 256


def obstacle(R: int) -> str | None:
    """Why a bottleneck of ``R`` cannot be computed by the kernels, or ``None``."""
    if R > MAX_BOTTLENECK:
        return (
            f"the bottleneck is {R} wide; the kernels keep it in registers, up to {MAX_BOTTLENECK}"
        )
    return None


@dataclass(frozen=True, slots=True)
class BottleneckConfig:
    """``block_m`` rows a program, ``block_d`` of their columns at a time."""

    block_m: int
    block_d: int
    num_warps: int
    num_stages: int

    @classmethod
    def choose(
        cls, M: int, R: int, *, itemsize: int, aligned: bool, target: Target
    ) -> BottleneckConfig:
        """Every program reads both factors from L2, so it has many rows, unless few rows would leave the GPU a quarter empty."""
        padded = block_r(R)
        # 64 rows of a bottleneck of 256 take all 255 registers
        block_m = 64 if padded <= 128 else 32
        while block_m > 16 and 4 * cdiv(M, block_m) < 3 * target.sms:
            block_m //= 2
        block_d, num_warps, num_stages = 128 // itemsize, 8, 2
        if padded <= 128 // itemsize:
            num_warps, num_stages = 4, 3
        elif padded > 128 and target.capability is None:
            # a second buffer spills on AMD
            num_stages = 1
        elif padded > 128:
            block_d, num_stages = 64 // itemsize, 3
        if not aligned:
            block_d //= 2
        return cls(block_m, block_d, num_warps, num_stages)
