"""Launch configuration of the merge and its gradient, chosen by a pure function of numbers."""

from __future__ import annotations

from dataclasses import dataclass

_TILE = 4096
"""Elements of each tensor a program holds: 32 a thread, four loads of 16 bytes in flight for each tensor of 16 bits."""


@dataclass(frozen=True, slots=True)
class MergeConfig:
    """``block_s`` positions of one head a program."""

    block_s: int
    block_d: int

    @classmethod
    def choose(cls, D: int) -> MergeConfig:
        """The same for one position as for many: a smaller tile would be read in smaller pieces."""
        block_d = max(16, 1 << (D - 1).bit_length())
        return cls(max(1, _TILE // block_d), block_d)
