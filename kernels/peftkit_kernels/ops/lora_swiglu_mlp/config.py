"""Launch configurations of the gate, chosen by pure functions of numbers; the machine-code tests compile each one."""

from __future__ import annotations

from dataclasses import dataclass

from peftkit_kernels.core.launch import Target, cdiv
from peftkit_kernels.low_rank.config import RANK_TILE

_PROGRAMS_A_MULTIPROCESSOR = 4
_MIN_STEPS = 8
"""The least number of blocks of F in each program of the forward, so that its partial sums of s move few bytes."""
_MIN_CHUNK_M = 256
_MAX_FLOAT32_RANK = 16
"""Exact float32 products do not use tensor cores and need many registers: rank 32 reaches 0.7 of DRAM bandwidth, 64 spills on sm_90."""


def holds(rank: int, itemsize: int) -> bool:
    """Whether the gate's kernels also compute the updates: they hold all ranks of each adapter in registers."""
    return rank <= (_MAX_FLOAT32_RANK if itemsize == 4 else RANK_TILE)


@dataclass(frozen=True, slots=True)
class GateConfig:
    """A program owns ``block_m`` rows; ``splits`` programs share the F of one row block.

    ``block_m`` is at least 16 rows for each warp. With fewer, several warps share a tile of the products and each evaluates
    the activation of the whole tile: 46 clocks for each element on sm_80 instead of 25.
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

        ``mixed`` means float32 factors with 16-bit activations, here and below.
        """
        block_m, block_f = 64, 32 if aligned else 16
        programs = cdiv(M, block_m)
        wanted = cdiv(_PROGRAMS_A_MULTIPROCESSOR * target.sms, programs)
        splits = min(wanted, cdiv(cdiv(F, block_f), _MIN_STEPS))
        if mixed and block_r > 16 and target.capability not in (90, 100):
            # the parts of three float32 factors spill a few registers in 4 warps on sm_80
            return cls(block_m, block_f, splits, num_warps=8, num_stages=1)
        if target.capability == 90 and aligned and block_r <= 16 and not mixed:
            # measured on an H100 at rank 16: 0.78 of the time of 32 columns and two stages
            return cls(block_m, 64, splits, num_stages=3)
        return cls(block_m, block_f, splits)


@dataclass(frozen=True, slots=True)
class GateBackwardConfig:
    """A program owns ``chunk_m`` rows and ``block_f`` columns, and reads ``block_m`` rows at a time."""

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
        """Long chunks, because they make few partial sums of dA; shorter ones if there are too few programs to fill the GPU."""
        # the factors stay in registers: factors of rank 64 with 64 columns spill
        block_m, block_f = (32, 64) if block_r <= 16 else (64, 32)
        if block_r > 64:
            block_m = 32  # 64 rows at rank 128 spill on sm_90
        num_warps, num_stages = 4, 2
        if mixed and block_r > 16:
            # 32 columns spill in 4 warps, on sm_80 also 16; on sm_90 32 columns also spill in 8 warps
            hopper = target.capability in (90, 100)
            block_m, block_f = (64, 16) if hopper else (32, 32)
            num_stages = 1
            num_warps = 4 if hopper else 8
        programs = _PROGRAMS_A_MULTIPROCESSOR
        if target.capability == 90 and block_r <= 16 and not mixed:
            # measured on an H100 at rank 16: 0.77 of the time of two stages and half as many programs
            num_stages, programs = 3, 8
        if itemsize == 4:
            block_m, block_f, num_stages = 32, 32, 1
        if not aligned:
            # single elements of 2 bytes cannot be copied asynchronously, so a second buffer would only take registers; 4 warps
            # spill a few registers at rank 16 on sm_90, 8 warps at rank 64 on sm_86
            block_m, block_f, num_stages = 32, 16, 1
            num_warps = 8 if block_r <= 16 else 4
        chunk_m = 1024
        wanted = programs * target.sms
        while chunk_m > _MIN_CHUNK_M and cdiv(M, chunk_m) * cdiv(F, block_f) < wanted:
            chunk_m //= 2
        return cls(block_m, block_f, chunk_m, num_warps, num_stages)
