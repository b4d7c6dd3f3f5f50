"""Launch configurations of the DoRA kernels."""

from __future__ import annotations

from dataclasses import dataclass

from peftkit_kernels.core.launch import Target, cdiv
from peftkit_kernels.low_rank.config import block_r


@dataclass(frozen=True, slots=True)
class NormConfig:
    """A program owns ``block_n`` rows of the weight and reads ``block_k`` columns at a time."""

    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def choose(cls, R: int, *, itemsize: int) -> NormConfig:
        """Few rows in each program, so that a weight of 4096 rows makes 256 programs."""
        if itemsize == 4:
            return cls(16, 64 if block_r(R) < 64 else 32)
        return cls(16, 128 if block_r(R) < 64 else 64)


@dataclass(frozen=True, slots=True)
class MagnitudeConfig:
    """A program owns ``chunk_m`` rows and ``block_n`` columns."""

    block_m: int
    block_n: int
    chunk_m: int
    num_warps: int = 4

    @classmethod
    def choose(cls, M: int, N: int, *, target: Target) -> MagnitudeConfig:
        """Long chunks, because they make few partial sums; shorter ones if there are too few programs to fill the GPU."""
        block_m, block_n, chunk_m = 16, 128, 1024
        while chunk_m > 4 * block_m and cdiv(M, chunk_m) * cdiv(N, block_n) < 2 * target.sms:
            chunk_m //= 2
        return cls(block_m, block_n, chunk_m)
