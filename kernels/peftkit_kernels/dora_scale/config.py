"""Launch configurations of the element-wise passes: tiles of 128 columns, and rows enough to fill the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from peftkit_kernels.launch import Target, cdiv

_BLOCK_N = 128
"""One row of a tile is 256 bytes of 16-bit elements: 16 threads with a 128-bit access each."""
_MAX_CHUNK_M, _MIN_CHUNK_M = 1024, 64
"""A sum moves 8 bytes a chunk and column, written and read again: of the gate's four 0.3% and 5% of what 16-bit streams do."""
_PROGRAMS_A_MULTIPROCESSOR = 4
"""Keep 24 KiB of the gate's streams in flight, 32 of the other's: more than the 16 that hide an H100's latency."""


@dataclass(frozen=True, slots=True)
class ForwardConfig:
    """One tile a program."""

    block_m: int = 16
    block_n: int = _BLOCK_N
    num_warps: int = 4


@dataclass(frozen=True, slots=True)
class BackwardConfig:
    """``chunk_m`` rows and ``block_n`` columns a program."""

    block_m: int
    block_n: int
    chunk_m: int
    num_warps: int = 4

    @classmethod
    def choose(cls, op: str, M: int, N: int, *, target: Target) -> BackwardConfig:
        """Long chunks make few partial sums; shorter ones fill the GPU.

        Args:
            op: ``"dora_scale"`` or ``"dora_gate"``.
            M: Rows.
            N: Columns.
            target: Where it runs.
        """
        # 16 elements a thread, 8 in the 64 lanes of an AMD wave: 128-bit accesses; the gate's three streams and four sums have
        # the registers for 8, and so has the other op from sm_100 on, where 16 spill if 16 does not divide the rows
        capability = target.capability
        few = capability is not None and (op == "dora_gate" or capability >= 100)
        block_m = 8 if few else 16
        chunk_m = _MAX_CHUNK_M
        wanted = _PROGRAMS_A_MULTIPROCESSOR * target.sms
        while chunk_m > _MIN_CHUNK_M and cdiv(M, chunk_m) * cdiv(N, _BLOCK_N) < wanted:
            chunk_m //= 2
        return cls(block_m, _BLOCK_N, chunk_m)
