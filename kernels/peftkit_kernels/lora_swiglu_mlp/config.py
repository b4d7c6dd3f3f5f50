"""Launch configurations of the gate, chosen by pure functions of numbers; the machine-code tests compile each one."""

from __future__ import annotations

from dataclasses import dataclass

from peftkit_kernels.launch import Target, cdiv

_PROGRAMS_A_MULTIPROCESSOR = 4
_MIN_STEPS = 8
"""Blocks of F a program of the forward has at least, so that its partial sums of s are worth little."""
_MIN_CHUNK_M = 256
_MAX_FLOAT32_RANK = 16
"""Exact float32 products are made of registers and instructions: rank 32 streams at 0.7 of DRAM bandwidth, 64 spills on sm_90."""


def obstacle(rank: int, itemsize: int) -> str | None:
    """Why adapters of this rank cannot be computed by the gate's kernels, or ``None``."""
    if itemsize == 4 and rank > _MAX_FLOAT32_RANK:
        return (
            f"the rank is {rank} in float32; the gate's kernels keep a tile of each adapter in registers, "
            f"up to {_MAX_FLOAT32_RANK}"
        )
    return None


@dataclass(frozen=True, slots=True)
class GateConfig:
    """``splits`` programs share the F of one row block.

    ``block_m`` is at least 16 rows a warp: with fewer, several warps share a tile of the products and each evaluates the
    activation of all of it, 46 clocks an element on sm_80 instead of 25.
    """

    block_m: int
    block_f: int
    splits: int
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def choose(
        cls, M: int, F: int, block_r: int, *, aligned: bool, target: Target, mixed: bool = False
    ) -> GateConfig:
        """Split F until every multiprocessor has several programs, whose loads hide each other's latency.

        ``mixed`` is float32 factors beside 16-bit activations, here and below.
        """
        block_m, block_f = 64, 32 if aligned else 16
        programs = cdiv(M, block_m)
        wanted = cdiv(_PROGRAMS_A_MULTIPROCESSOR * target.sms, programs)
        splits = min(wanted, cdiv(cdiv(F, block_f), _MIN_STEPS))
        if mixed and block_r > 16 and target.capability not in (90, 100):
            # the parts of three wide factors spill a few registers in 4 warps on sm_80
            return cls(block_m, block_f, splits, num_warps=8, num_stages=1)
        return cls(block_m, block_f, splits)


@dataclass(frozen=True, slots=True)
class GateBackwardConfig:
    """``chunk_m`` rows and ``block_f`` columns a program."""

    block_m: int
    block_f: int
    chunk_m: int
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def choose(
        cls,
        M: int,
        F: int,
        block_r: int,
        *,
        itemsize: int,
        aligned: bool,
        target: Target,
        mixed: bool = False,
    ) -> GateBackwardConfig:
        """Long chunks make few partial sums of dA; shorter ones where the GPU would not be full."""
        # the factors stay in registers: 64 of them beside 64 columns spill
        block_m, block_f = (32, 64) if block_r <= 16 else (64, 32)
        if block_r > 64:
            block_m = 32  # and 64 rows of 128 on sm_90
        num_warps, num_stages = 4, 2
        if mixed and block_r > 16:
            # 32 columns spill in 4 warps, 16 on sm_80 too, and 32 in 8 on sm_90
            hopper = target.capability in (90, 100)
            block_m, block_f = (64, 16) if hopper else (32, 32)
            num_stages = 1
            num_warps = 4 if hopper else 8
        if itemsize == 4:
            block_m, block_f, num_stages = 32, 32, 1
        if not aligned:
            # elements of 2 bytes are not copied asynchronously, so that a second buffer only takes registers; 4 warps spill a
            # few of them at rank 16 on sm_90, 8 at rank 64 on sm_86
            block_m, block_f, num_stages = 32, 16, 1
            num_warps = 8 if block_r <= 16 else 4
        chunk_m = 1024
        wanted = _PROGRAMS_A_MULTIPROCESSOR * target.sms
        while chunk_m > _MIN_CHUNK_M and cdiv(M, chunk_m) * cdiv(F, block_f) < wanted:
            chunk_m //= 2
        return cls(block_m, block_f, chunk_m, num_warps, num_stages)
