"""The sizes for which the weight is decoded inside the product, and the launch configurations of that kernel."""

from __future__ import annotations

from dataclasses import dataclass

from peftkit_kernels.core.launch import Target, cdiv

_MIN_STEPS = 4
"""The least number of steps of K in each program; with fewer, the latency of the loads dominates."""

_SMALL_ROWS = {100: 16, 90: 32, 80: 64}
"""By compute capability: the number of rows up to which decoding inside the product is predicted to be faster than decoding first."""

_SMALL_ROWS_ELSEWHERE = 128
"""For consumer GPUs (86, 89, 120), whose DRAM is slow compared with their tensor cores."""

_LARGEST_STEP = 128


def small_rows(N: int, *, target: Target) -> int:
    """The number of rows up to which the weight is decoded inside the product; half if the columns do not fill the GPU.

    The defaults are from published calibrations of a comparable CUDA kernel; a calibration of the GPU replaces them.
    """
    rows = target.calibration.small_m
    if rows is None:
        rows = _SMALL_ROWS.get(target.capability or 80, _SMALL_ROWS_ELSEWHERE)
    return rows // 2 if cdiv(N, 64) < target.sms else rows


def nf4_step(K: int, blocksize: int) -> int:
    """Elements of K in a step: one block, or a part of a large block. 0 if rows are not whole steps."""
    step = min(blocksize, _LARGEST_STEP)
    return 0 if K % step else step


@dataclass(frozen=True, slots=True)
class SmallConfig:
    """A tile of y is ``block_m`` by ``block_n``; ``splits`` programs share the K of one tile."""

    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int = 4
    num_stages: int = 1

    @classmethod
    def choose(
        cls,
        M: int,
        N: int,
        K: int,
        *,
        block_k: int,
        itemsize: int,
        four_bit: bool,
        nested: bool,
        target: Target,
    ) -> SmallConfig:
        """The smallest tile that holds the rows, up to 64, and enough programs to fill the GPU.

        Decoding takes 11.4 clocks for each weight in 4 warps (nested 12.4) and 16 in 8 warps (nested 16.5). A tile of 64 rows
        needs 8 warps, and so does one of 32 rows with nested maxima, which spills in 4 warps on sm_80.
        """
        block_m = min(64, max(16, 1 << (M - 1).bit_length()))
        block_n = 32 if itemsize == 4 else 64
        programs = cdiv(N, block_n) * cdiv(M, block_m)
        splits = 1
        if programs < target.sms:
            splits = min(cdiv(target.sms, programs), cdiv(cdiv(K, block_k), _MIN_STEPS))
        narrow = block_m <= (16 if nested else 32)
        # 32 float16 rows with 8-bit codes spill a few registers on sm_90, except with two buffers
        buffers = 2 if block_m == 32 and not four_bit and target.capability == 90 else 1
        return cls(block_m, block_n, block_k, splits, 4 if narrow else 8, buffers)
