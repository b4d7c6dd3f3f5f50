"""Launch configurations of the 8-bit linear."""

from __future__ import annotations

from dataclasses import dataclass

from peftkit_kernels.low_rank.config import block_r


@dataclass(frozen=True, slots=True)
class QuantizeConfig:
    """``block_m`` rows a program, ``block_k`` columns at a time."""

    block_m: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def choose(cls, R: int, *, itemsize: int, dropout: bool, aligned: bool) -> QuantizeConfig:
        """Few rows, so that what a multiprocessor reads twice stays in L2: 16 rows of 8192 in 16 bits are 256 KiB."""
        # the mask beside a factor of rank 64 spills a few registers in 4 warps on sm_90
        num_warps = 8 if dropout and block_r(R) > 32 else 4
        return cls(16, 64 if dropout or itemsize == 4 or not aligned else 128, num_warps)


@dataclass(frozen=True, slots=True)
class Int8GemmConfig:
    """One tile of y a program, ``group`` rows of tiles at a time."""

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
        """The mask of a wide tile does not fit the registers beside the tile.

        A step costs 300 clocks besides its products, whatever its length: 618 clocks for 512 of products on sm_80 with 128 of K,
        578 for 256 with 64.
        """
        block_k = 128 if aligned else 32
        if itemsize == 4 and block_r(R) > 16:
            # without tensor cores the update's product is unrolled: 128 x 128 of rank 64 spill kilobytes
            return cls(64, 32, block_k)
        if M <= 64:
            return cls(64, 64, block_k, num_warps=4)
        return cls(128, 64 if dropout else 128, block_k)
