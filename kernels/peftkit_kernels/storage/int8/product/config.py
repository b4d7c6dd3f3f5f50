"""Launch configurations of the 8-bit linear."""

from __future__ import annotations

from dataclasses import dataclass

from peftkit_kernels.core.launch import Target, cdiv
from peftkit_kernels.low_rank.config import block_r


@dataclass(frozen=True, slots=True)
class QuantizeConfig:
    """A program owns ``block_m`` rows and reads ``block_k`` columns at a time."""

    block_m: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def choose(cls, R: int, *, itemsize: int, dropout: bool, aligned: bool) -> QuantizeConfig:
        """Few rows in each program, so that L2 still holds them at the second read: 16 rows of 8192 in 16 bits are 256 KiB."""
        # the mask together with a factor of rank 64 spills a few registers in 4 warps on sm_90
        num_warps = 8 if dropout and block_r(R) > 32 else 4
        return cls(16, 64 if dropout or itemsize == 4 or not aligned else 128, num_warps)


@dataclass(frozen=True, slots=True)
class LargeColumnsConfig:
    """A program owns ``chunk_m`` rows and ``block_k`` columns, and reads ``block_m`` rows at a time."""

    block_m: int
    block_k: int
    chunk_m: int
    num_warps: int = 4
    num_stages: int = 3

    @classmethod
    def choose(cls, M: int, K: int, *, target: Target) -> LargeColumnsConfig:
        """Long chunks, because one program then reads a byte of each; shorter ones if there are too few programs to fill the GPU."""
        block_m, block_k, chunk_m = 32, 128, 1024
        while chunk_m > 2 * block_m and cdiv(M, chunk_m) * cdiv(K, block_k) < 4 * target.sms:
            chunk_m //= 2
        return cls(block_m, block_k, chunk_m)


@dataclass(frozen=True, slots=True)
class Int8GemmConfig:
    """Each program computes one tile of y; ``group`` rows of tiles are finished before the next ones."""

    block_m: int
    block_n: int
    block_k: int
    group: int = 8
    num_warps: int = 8
    num_stages: int = 3

    @classmethod
    def choose(
        cls, M: int, R: int, *, itemsize: int, dropout: bool, aligned: bool
    ) -> Int8GemmConfig:
        """Long steps, and narrow tiles with dropout: the registers would not hold a wide tile and its mask.

        A step takes about 300 clocks besides its products for any length: on sm_80 618 clocks for 512 of products with 128 of
        K, and 578 for 256 with 64 of K.
        """
        block_k = 128 if aligned else 32
        if itemsize == 4 and block_r(R) > 16:
            # without tensor cores the compiler unrolls the product of the update, and 128 x 128 at rank 64 spills kilobytes
            return cls(64, 32, block_k)
        if M <= 64:
            return cls(64, 64, block_k, num_warps=4)
        return cls(128, 64 if dropout else 128, block_k)
