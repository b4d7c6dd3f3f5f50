"""Launch configuration of the norms: whole rows in registers, so that each is read once."""

from __future__ import annotations

from dataclasses import dataclass

MAX_WIDTH = {"frozen_rms_norm": 16384, "frozen_layer_norm": 8192}
"""Elements of a row: 32 warps, the most a program may have, with 16 elements a thread. At that size the backward of LayerNorm, which
has a mean more, spills on sm_80 with Triton 3.7. Half as many where 16 does not divide them."""

_ELEMENTS_A_WARP = 512
"""16 elements a thread: two 128-bit loads of 16-bit elements. With 32 the backward, which holds three rows, spills; read by
elements, whose addresses take registers, it does with 16."""
_MIN_WARPS, _MAX_WARPS = 4, 32


def obstacle(op: str, K: int) -> str | None:
    """Why rows of ``K`` elements cannot be normalised by the kernels of ``op``, or ``None``."""
    longest = MAX_WIDTH[op] // (2 if K % 16 else 1)
    if longest < K:
        return f"a row has {K} elements; the kernels keep one in registers, up to {longest}"
    return None


@dataclass(frozen=True, slots=True)
class NormConfig:
    """``block_m`` rows a program, padded to ``block_k``."""

    block_m: int
    block_k: int
    num_warps: int

    @classmethod
    def choose(cls, K: int, *, aligned: bool) -> NormConfig:
        """Short rows (of one attention head, say) share a program."""
        block_k, elements = max(16, 1 << (K - 1).bit_length()), _ELEMENTS_A_WARP
        if not aligned:
            elements //= 2
        block_m = max(1, _MIN_WARPS * elements // block_k)
        return cls(block_m, block_k, min(max(_MIN_WARPS, block_k // elements), _MAX_WARPS))
