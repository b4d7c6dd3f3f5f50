"""Launch configuration of the norms: a program holds whole rows in registers, so that each row is read once."""

from __future__ import annotations

from dataclasses import dataclass

MAX_WIDTH = {"frozen_rms_norm": 16384, "frozen_layer_norm": 8192}
"""Largest number of elements in a row: 16 in each thread of 32 warps, the most that a program may have. At that size the backward of
LayerNorm, which has one more mean, spills on sm_80 with Triton 3.7. The limit is half if 16 does not divide the row length."""

_ELEMENTS_A_WARP = 512
"""16 elements in each thread: two 128-bit loads of 16-bit elements. With 32 elements the backward, which holds three rows, spills.
If rows are read element by element, addresses take registers and 16 elements spill too."""
_MIN_WARPS, _MAX_WARPS = 4, 32


def obstacle(op: str, K: int) -> str | None:
    """Why the kernels of ``op`` cannot normalise rows of ``K`` elements, or ``None``."""
    longest = MAX_WIDTH[op] // (2 if K % 16 else 1)
    if longest < K:
        return f"a row has {K} elements; the kernels keep one in registers, up to {longest}"
    return None


@dataclass(frozen=True, slots=True)
class NormConfig:
    """A program holds ``block_m`` rows, padded to ``block_k`` elements."""

    block_m: int
    block_k: int
    num_warps: int

    @classmethod
    def choose(cls, K: int, *, aligned: bool) -> NormConfig:
        """Short rows, for example of one attention head, share a program."""
        block_k, elements = max(16, 1 << (K - 1).bit_length()), _ELEMENTS_A_WARP
        if not aligned:
            elements //= 2
        block_m = max(1, _MIN_WARPS * elements // block_k)
        return cls(block_m, block_k, min(max(_MIN_WARPS, block_k // elements), _MAX_WARPS))
