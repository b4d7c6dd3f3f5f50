"""Launch configurations of the NF4 kernels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DequantizeConfig:
    """A program decodes ``block`` words of eight elements.

    With 32 elements in each thread an element takes 8.4 instructions on sm_80, of which the table is 1; with 16 elements, 10.9.
    """

    block: int
    num_warps: int = 4

    @classmethod
    def choose(cls, *, whole: bool) -> DequantizeConfig:
        """Half as many words if rows are not ``whole`` words, because then each element needs its own address and row number."""
        return cls(512 if whole else 256)


@dataclass(frozen=True, slots=True)
class QuantizeConfig:
    """A program quantises ``blocks`` blocks."""

    blocks: int
    num_warps: int = 4

    @classmethod
    def choose(cls, blocksize: int) -> QuantizeConfig:
        """16 elements in each thread, or 32 if one block already needs more than 16."""
        return cls(max(1, 2048 // blocksize))
