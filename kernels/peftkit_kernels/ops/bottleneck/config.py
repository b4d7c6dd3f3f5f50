"""Launch configuration of the adapter, chosen by a pure function of numbers; the machine-code tests compile each one."""

from __future__ import annotations

from dataclasses import dataclass

from peftkit_kernels.core.launch import Target, cdiv
from peftkit_kernels.low_rank.config import block_r

MAX_BOTTLENECK = 256


def obstacle(R: int) -> str | None:
    """Why the kernels cannot compute a bottleneck of size ``R``, or ``None``."""
    if R > MAX_BOTTLENECK:
        return (
            f"the bottleneck is {R} wide; the kernels keep it in registers, up to {MAX_BOTTLENECK}"
        )
    return None


@dataclass(frozen=True, slots=True)
class BottleneckConfig:
    """A program owns ``block_m`` rows and reads ``block_d`` of their columns at a time."""

    block_m: int
    block_d: int
    num_warps: int
    num_stages: int

    @classmethod
    def choose(
        cls, M: int, R: int, *, itemsize: int, aligned: bool, target: Target
    ) -> BottleneckConfig:
        """Many rows in each program, because every program reads both factors from L2; fewer if a quarter of the GPU would be idle."""
        padded = block_r(R)
        # with a bottleneck of 256, 64 rows would take all 255 registers
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
