"""The launch configuration of the rotation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RotateConfig:
    """Each program rotates ``block_m`` rows of one head; ``block_h`` is half a head, padded to a power of two."""

    block_m: int
    block_h: int
    num_warps: int = 4

    @classmethod
    def choose(cls, head_size: int, *, norm: bool) -> RotateConfig:
        """About 2,048 pairs in each program, so that the six loads of a pair stay in registers; half of that with the norm's loads."""
        block_h = max(16, 1 << (head_size // 2 - 1).bit_length())
        return cls(max(1, (1024 if norm else 2048) // block_h), block_h)
