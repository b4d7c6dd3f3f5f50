"""Launch configurations of the NF4 kernels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DequantizeConfig:
    """``block`` words of eight elements a program.

    32 elements a thread: 8.4 instructions each on sm_80, of which the table is 1; with 16 elements it is 10.9.
    """

    block: int
    num_warps: int = 4

    @classmethod
    def choose(cls, *, whole: bool) -> DequantizeConfig:
        """Half as many where rows are not ``whole`` words: each element has an address, and a row, of its own."""
        return cls(512 if whole else 256)


@dataclass(frozen=True, slots=True)
class QuantizeConfig:
    """``blocks`` quantisation blocks a program."""

    blocks: int
    num_warps: int = 4

    @classmethod
    def choose(cls, blocksize: int) -> QuantizeConfig:
        """16 elements a thread; 32 where a block alone is larger than that."""
        return cls(max(1, 2048 // blocksize))
