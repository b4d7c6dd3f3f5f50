"""Launch configurations of the passes over tiles of rows, chosen by pure functions of numbers."""

from __future__ import annotations

from dataclasses import dataclass

from peftkit_kernels.core.launch import Target, cdiv
from peftkit_kernels.low_rank.config import block_r

MAX_BLOCK = 64
"""Most rows in a tile of a plan: with more the registers would not hold the tile and the factor."""
_FLOAT32_RANK = 16
"""Largest rank in float32. Float32 products do not use tensor cores: at rank 64 instructions limit the passes to 0.4 of DRAM
bandwidth, and they spill."""
_MIN_STEPS = 4
"""The least number of blocks of K in each program of a split shrink; with fewer, pipelining the loads does not help."""


def obstacle(block: int, R: int, *, itemsize: int) -> str | None:
    """Why the kernels do not support tiles of ``block`` rows and rank ``R``, as a sentence, or ``None``."""
    if block > MAX_BLOCK:
        return (
            f"the plan has tiles of {block} rows and the kernels support up to {MAX_BLOCK}; "
            f"use plan_groups(block={MAX_BLOCK}) or backend='auto'"
        )
    if itemsize == 4 and block_r(R) > _FLOAT32_RANK:
        return (
            f"the rank is {R} and the kernels support up to {_FLOAT32_RANK} in float32; "
            "use a 16-bit dtype or backend='auto'"
        )
    return None


def block_m(block: int) -> int:
    """Rows that a program holds for tiles of ``block``: 16, the least that ``tl.dot`` takes (for decoding), or ``MAX_BLOCK``."""
    return 16 if block <= 16 else MAX_BLOCK


@dataclass(frozen=True, slots=True)
class GroupedShrinkConfig:
    """A program reads ``block_k`` columns of one tile at a time; ``splits`` programs share the K of the tile."""

    block_k: int
    splits: int
    num_warps: int = 4
    num_stages: int = 3

    @classmethod
    def choose(
        cls, M: int, K: int, R: int, *, block: int, itemsize: int, aligned: bool, target: Target
    ):
        """Enough programs to fill the GPU even with few rows. The number of used tiles is not known, but is at least M / block."""
        # 64 x 128 spills on sm_80, because each row needs an address
        narrow = block_r(R) <= 32 and block_m(block) == 16
        block_k = (128 if narrow else 64) * 2 // itemsize // (1 if aligned else 2)
        splits = min(cdiv(target.sms, cdiv(M, block)), cdiv(cdiv(K, block_k), _MIN_STEPS))
        # with a wide factor 64 rows spill in four warps on sm_100
        wide = block_m(block) == MAX_BLOCK and block_r(R) >= 64
        return cls(block_k, splits, 8 if wide else 4)


@dataclass(frozen=True, slots=True)
class GroupedExpandConfig:
    """A program computes ``block_n`` columns of one tile of rows."""

    block_n: int
    num_warps: int = 4
    num_stages: int = 1

    @classmethod
    def choose(cls, R: int, *, itemsize: int, aligned: bool):
        """As for the expand of one adapter (``low_rank.config``)."""
        block_n = 64 if itemsize == 4 or block_r(R) > 64 else 128
        return cls(block_n) if aligned else cls(block_n // 2, 8)


@dataclass(frozen=True, slots=True)
class GroupedTallConfig:
    """A program owns ``block_c`` columns of one segment and reads ``block_m`` rows at a time."""

    block_m: int
    block_c: int
    num_warps: int
    num_stages: int = 2

    @classmethod
    def choose(cls, R: int, *, itemsize: int, aligned: bool, mixed: bool = False):
        """As for the tall pass of one adapter; ``mixed`` means a float32 ds with a 16-bit x."""
        block_c = 128 * 2 // itemsize // (1 if aligned else 2)
        if block_r(R) > 64:
            return cls(32, block_c, 8)
        if mixed and block_r(R) == 64:
            return cls(64, block_c, 8)  # 4 warps spill on sm_90
        return cls(32 if itemsize == 4 else 64, block_c, 4)
