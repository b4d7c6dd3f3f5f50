"""Launch configurations of the element-wise passes: tiles of 128 columns, and enough programs to fill the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from peftkit_kernels.core.launch import Target, cdiv

_BLOCK_N = 128
"""One row of a tile is 256 bytes of 16-bit elements: 16 threads with a 128-bit access each."""
_MAX_CHUNK_M, _MIN_CHUNK_M = 1024, 64
"""A partial sum moves 8 bytes for each chunk and column (it is written and read). The four sums of the gate move 0.3% of the bytes of
16-bit tensors at the longest chunk and 5% at the shortest."""
_PROGRAMS_A_MULTIPROCESSOR = 4
"""They keep 24 KiB of the gate's tensors in flight, 32 KiB of those of the other op: more than the 16 that hide an H100's latency."""


@dataclass(frozen=True, slots=True)
class ForwardConfig:
    """Each program computes one tile."""

    block_m: int = 16
    block_n: int = _BLOCK_N
    num_warps: int = 4


@dataclass(frozen=True, slots=True)
class BackwardConfig:
    """A program owns ``chunk_m`` rows and ``block_n`` columns, and reads ``block_m`` rows at a time."""

    block_m: int
    block_n: int
    chunk_m: int
    num_warps: int = 4

    @classmethod
    def choose(cls, op: str, M: int, N: int, *, target: Target) -> BackwardConfig:
        """Long chunks, because they make few partial sums; shorter ones if there are too few programs to fill the GPU.

        Args:
            op: ``"dora_scale"`` or ``"dora_gate"``.
            M: Rows.
            N: Columns.
            target: The GPU.
        """
        # 16 elements for each thread (8 for each of the 64 lanes of an AMD wave) allow 128-bit accesses. The registers hold
        # only 8 of the gate's three tensors and four sums; from sm_100 on also only 8 of the other op, where 16 spill if 16
        # does not divide the row length
        capability = target.capability
        few = capability is not None and (op == "dora_gate" or capability >= 100)
        block_m = 8 if few else 16
        chunk_m = _MAX_CHUNK_M
        wanted = _PROGRAMS_A_MULTIPROCESSOR * target.sms
        while chunk_m > _MIN_CHUNK_M and cdiv(M, chunk_m) * cdiv(N, _BLOCK_N) < wanted:
            chunk_m //= 2
        return cls(block_m, _BLOCK_N, chunk_m)
