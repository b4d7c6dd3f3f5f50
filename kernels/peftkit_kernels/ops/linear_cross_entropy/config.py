"""Rows in a chunk, and the launch configuration of the row pass: pure functions of numbers."""

from __future__ import annotations

from dataclasses import dataclass

_CPU_CHUNK_BYTES = 2**25
"""Largest buffer of logits on the CPU. Each product of a chunk reads the whole head through the cache, so chunks of few rows
take longer than a buffer that is larger than the cache. Two Zen 5 cores with 32 MiB of cache, float32, M 512, D 576, V 49152, forward and
backward: chunks of 32 rows (6 MiB) 364 ms, 64 (12 MiB) 292, 128 (24 MiB) 242, 256 (48 MiB) 247, 512 (96 MiB) 263;
all logits at once by autograd 636 ms.
"""
_GPU_CHUNK_BYTES = 2**28
_GPU_MIN_ROWS = 256


def choose_chunk(M: int, V: int, *, itemsize: int, cpu: bool) -> int:
    """Rows in a chunk, for ``M`` rows of ``V`` logits of ``itemsize`` bytes."""
    row_bytes = V * itemsize
    if not cpu:
        return max(_GPU_MIN_ROWS, 1 << max(_GPU_CHUNK_BYTES // row_bytes, 1).bit_length() - 1)
    limit = max(_CPU_CHUNK_BYTES // row_bytes, 16)
    chunks = max(-(-M // limit), 1)
    return max(-(-M // chunks), 1)


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
