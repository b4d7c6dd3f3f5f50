"""Launch configuration of the merge and its gradient, chosen by a pure function of numbers."""

from __future__ import annotations

from dataclasses import dataclass

_TILE = 4096
"""Elements of each tensor in a program: 32 for each thread, so that a 16-bit tensor has four loads of 16 bytes in flight."""


@dataclass(frozen=True, slots=True)
class MergeConfig:
    """A program owns ``block_s`` positions of one head."""

    block_s: int
    block_d: int

    @classmethod
    def choose(cls, D: int) -> MergeConfig:
        """The same tile for one position as for many, because a smaller tile would be read in smaller pieces."""
        block_d = max(16, 1 << (D - 1).bit_length())
        return cls(max(1, _TILE // block_d), block_d)
