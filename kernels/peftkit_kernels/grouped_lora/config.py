"""Launch configurations of the passes over tiles of rows, chosen by pure functions of numbers."""

from __future__ import annotations

from dataclasses import dataclass

from peftkit_kernels.launch import Target, cdiv
from peftkit_kernels.low_rank.config import block_r

MAX_BLOCK = 64
"""Most rows of a plan's tile: larger ones would not fit the registers beside the factor."""
_FLOAT32_RANK = 16
"""Float32 products have no tensor cores: at rank 64 the passes reach 0.4 of DRAM bandwidth by their instructions, and spill."""
_MIN_STEPS = 4
"""Blocks of K a program of a split shrink has at least, so that its loads are worth pipelining."""


def obstacle(block: int, R: int, *, itemsize: int) -> str | None:
    """Why the kernels do not take tiles of ``block`` rows and rank ``R``, as a sentence, or ``None``."""
    if block > MAX_BLOCK:
        return (
            f"the plan has tiles of {block} rows and the kernels take up to {MAX_BLOCK}; "
            f"use plan_groups(block={MAX_BLOCK}) or backend='auto'"
        )
    if itemsize == 4 and block_r(R) > _FLOAT32_RANK:
        return (
            f"the rank is {R} and the kernels take up to {_FLOAT32_RANK} in float32; "
            "use 16 bits or backend='auto'"
        )
    return None


def block_m(block: int) -> int:
    """Rows a program holds for tiles of ``block``: the least that ``tl.dot`` takes, for decoding, or the most."""
    return 16 if block <= 16 else MAX_BLOCK


@dataclass(frozen=True, slots=True)
class GroupedShrinkConfig:
    """``splits`` programs share the K of one tile."""

    block_k: int
    splits: int
    num_warps: int = 4
    num_stages: int = 3

    @classmethod
    def choose(
        cls, M: int, K: int, R: int, *, block: int, itemsize: int, aligned: bool, target: Target
    ):
        """Fill the GPU with programs even where there are few rows; how many tiles are needed is not known, at least M / block."""
        # 64 x 128 spills on sm_80, where each row has an address of its own
        narrow = block_r(R) <= 32 and block_m(block) == 16
        block_k = (128 if narrow else 64) * 2 // itemsize // (1 if aligned else 2)
        splits = min(cdiv(target.sms, cdiv(M, block)), cdiv(cdiv(K, block_k), _MIN_STEPS))
        # 64 rows beside a wide factor spill in four warps on sm_100
        wide = block_m(block) == MAX_BLOCK and block_r(R) >= 64
        return cls(block_k, splits, 8 if wide else 4)


@dataclass(frozen=True, slots=True)
class GroupedExpandConfig:
    """One tile of rows and ``block_n`` columns a program."""

    block_n: int
    num_warps: int = 4
    num_stages: int = 1

    @classmethod
    def choose(cls, R: int, *, itemsize: int, aligned: bool):
        """As the expand of one adapter."""
        block_n = 64 if itemsize == 4 or block_r(R) > 64 else 128
        return cls(block_n) if aligned else cls(block_n // 2, 8)


@dataclass(frozen=True, slots=True)
class GroupedTallConfig:
    """``block_c`` columns of one segment a program, ``block_m`` rows at a time."""

    block_m: int
    block_c: int
    num_warps: int
    num_stages: int = 2

    @classmethod
    def choose(cls, R: int, *, itemsize: int, aligned: bool, mixed: bool = False):
        """As the tall pass of one adapter; ``mixed`` is a float32 ds beside a 16-bit x."""
        block_c = 128 * 2 // itemsize // (1 if aligned else 2)
        if block_r(R) > 64:
            return cls(32, block_c, 8)
        if mixed and block_r(R) == 64:
            return cls(64, block_c, 8)  # 4 warps spill on sm_90
        return cls(32 if itemsize == 4 else 64, block_c, 4)
