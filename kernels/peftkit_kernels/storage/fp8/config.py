"""Launch configuration of the float8 dequantise."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DequantizeConfig:
    """Each program dequantises one tile; each thread loads 16 codes at once."""

    block_n: int = 8
    block_k: int = 256
    num_warps: int = 4
