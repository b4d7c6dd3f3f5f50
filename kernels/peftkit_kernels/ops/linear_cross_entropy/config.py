"""Launch configuration of the row pass."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RowConfig:
    """A program reads ``block_v`` logits of its row at a time."""

    block_v: int
    num_warps: int

    @classmethod
    def choose(cls, V: int, *, capped: bool) -> RowConfig:
        """16 logits in each thread, or 8 if a tanh is evaluated besides the exponential."""
        block_v = min(2048 if capped else 4096, max(64, 1 << (V - 1).bit_length()))
        return cls(block_v, 8 if block_v >= 2048 else 4)
