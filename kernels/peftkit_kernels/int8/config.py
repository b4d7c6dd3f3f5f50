"""Launch configuration of the 8-bit dequantise."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DequantizeConfig:
    """One tile a program: 16 codes a thread, which it loads at once."""

    block_n: int = 8
    block_k: int = 256
    num_warps: int = 4
