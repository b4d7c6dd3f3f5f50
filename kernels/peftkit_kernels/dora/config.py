"""Launch configurations of the DoRA kernels."""

from __future__ import annotations

from dataclasses import dataclass

from peftkit_kernels.launch import Target, cdiv
from peftkit_kernels.low_rank.config import block_r


@dataclass(frozen=True, slots=True)
class NormConfig:
    """``block_n`` rows of the weight a program, ``block_k`` columns at a time."""

    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def choose(cls, R: int, *, itemsize: int) -> NormConfig:
        """Few rows a program: the norm of a weight of 4096 rows is 256 programs."""
        return cls(16, 64 if itemsize == 4 or block_r(R) > 64 else 128)


@dataclass(frozen=True, slots=True)
class MagnitudeConfig:
    """``chunk_m`` rows and ``block_n`` columns a program."""

    block_m: int
    block_n: int
    chunk_m: int
    num_warps: int = 4

    @classmethod
    def choose(cls, M: int, N: int, *, target: Target) -> MagnitudeConfig:
        """Long chunks make few partial sums; shorter ones fill the GPU."""
        block_m, block_n, chunk_m = 16, 128, 1024
        while chunk_m > 4 * block_m and cdiv(M, chunk_m) * cdiv(N, block_n) < 2 * target.sms:
            chunk_m //= 2
        return cls(block_m, block_n, chunk_m)
