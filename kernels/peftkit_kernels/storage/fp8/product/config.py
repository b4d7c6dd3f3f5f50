"""Launch configurations of the kernels around float8 products."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QuantizeConfig:
    """A program owns ``block_m`` rows and reads ``block_k`` columns at a time."""

    block_m: int = 4
    block_k: int = 512
    num_warps: int = 4

    @classmethod
    def choose(cls, K: int, *, itemsize: int) -> QuantizeConfig:
        """Few rows in each program, so that L2 still holds them at the second read: 4 rows of 8192 in 16 bits are 64 KiB."""
        block_k = 512 if itemsize == 2 else 256
        while block_k > 64 and block_k >= 2 * K:
            block_k //= 2
        return cls(block_k=block_k)


@dataclass(frozen=True, slots=True)
class TransposeConfig:
    """A program owns one tile; it reads and writes rows of 128 bytes, the size of a cache line."""

    block: int = 128
    num_warps: int = 8
