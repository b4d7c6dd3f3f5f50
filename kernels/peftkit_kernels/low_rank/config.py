"""Launch configurations of the rank-r passes, chosen by pure functions of numbers; the machine-code tests compile each one."""

from __future__ import annotations

from dataclasses import dataclass

from peftkit_kernels.launch import Target, cdiv

MAX_RANK = 128
_DY_PASS_RANK = 32
"""Up to here dB and ds come from one pass over dy: its partial sums move 4 R (1 / 512 + 1 / 1024) of what dy does, 37% at
R = 32; at 64, where registers halve the column block, it would be 125%, more than reading dy twice."""
_MIN_STEPS = 4
"""Blocks of K a program of a split shrink has at least, so that its loads are worth pipelining."""
_MIN_CHUNK_M = 256


def block_r(R: int) -> int:
    """The rank as a power of two that ``tl.dot`` takes."""
    return max(16, 1 << (R - 1).bit_length())


@dataclass(frozen=True, slots=True)
class ShrinkConfig:
    """``splits`` programs share the K of one row block."""

    block_m: int
    block_k: int
    splits: int
    num_warps: int = 4
    num_stages: int = 3

    @classmethod
    def choose(
        cls,
        M: int,
        K: int,
        R: int,
        *,
        itemsize: int,
        dropout: bool,
        aligned: bool,
        target: Target,
        mixed: bool = False,
    ) -> ShrinkConfig:
        """Share K among programs if row blocks alone would leave the GPU three quarters full or less.

        ``mixed`` is a float32 factor beside a 16-bit x, here and below.
        """
        wide = itemsize == 4
        block_k = 32 if wide else 64 if dropout or block_r(R) > 32 else 128
        block_m = 64
        if not aligned:
            block_k //= 2
        elif block_r(R) == 64 and dropout and not wide:
            # philox beside a wide product: 1.11 x DRAM bandwidth on A100, against 1.02 for 64 x 64
            block_m, block_k = 128, 32
        # 4 warps spill a few registers at rank 32 or with dropout in exact float32 on sm_90, and at 128 by elements on sm_120
        more = dropout or block_r(R) > 16 if wide else block_r(R) > 64 and not aligned
        num_warps = 8 if more else 4
        if block_k == 128 and target.capability not in (None, 90, 100):
            # 4 warps spill a few registers at rank 16 on sm_120, at 8 on sm_80 to sm_89: there products are those of one warp
            num_warps = 8
        if mixed and aligned and target.capability not in (90, 100):
            # each warp splits the factor's tile for itself: 16 rows a warp stream at 0.6 of DRAM bandwidth on A100
            block_k = 64 if block_r(R) <= 32 else 32
            block_m, num_warps = (128, 8 if dropout else 4) if block_r(R) == 64 else (64, 4)
        elif mixed and aligned and block_r(R) >= 64 and (block_r(R) > 64 or not dropout):
            # more than 1.1 x DRAM bandwidth on H100, against 1.06 for 64 x 64; at rank 128 enough bytes in flight
            block_m, num_warps = 128, 8
        programs = cdiv(M, block_m)
        splits = 1
        if 4 * programs < 3 * target.sms:
            splits = min(cdiv(target.sms, programs), cdiv(cdiv(K, block_k), _MIN_STEPS))
        return cls(block_m, block_k, splits, num_warps)


@dataclass(frozen=True, slots=True)
class ExpandConfig:
    """One tile of y a program."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 1

    @classmethod
    def choose(
        cls, R: int, *, itemsize: int, dropout: bool, aligned: bool, mixed: bool = False
    ) -> ExpandConfig:
        """Neither the mask of a wide tile nor the parts of a wide factor fit the registers beside the tile."""
        if itemsize == 4 and block_r(R) >= 64:
            # without tensor cores the whole product is unrolled, and 64 x 64 spills kilobytes
            return cls(32, 32, num_warps=8)
        narrow = dropout or itemsize == 4 or block_r(R) > (32 if mixed else 64)
        block_n = 64 if narrow else 128
        return cls(64, block_n if aligned else block_n // 2)


@dataclass(frozen=True, slots=True)
class TallConfig:
    """``chunk_m`` rows and ``block_c`` columns a program."""

    block_m: int
    block_c: int
    chunk_m: int
    num_warps: int
    num_stages: int = 2

    @classmethod
    def choose(
        cls,
        M: int,
        C: int,
        R: int,
        *,
        itemsize: int,
        dropout: bool,
        with_p: bool,
        aligned: bool,
        target: Target,
        mixed: bool = False,
    ) -> TallConfig:
        """Long chunks make few partial sums; shorter ones where the GPU would stand three quarters full or less."""
        rank, wide = block_r(R), itemsize == 4
        if with_p:
            # rows of s and b that are no multiple of 8 long are read by elements: 512 columns of them spill kilobytes
            block_m, block_c, num_warps = 32, 128 if wide else 256 if R % 8 else 512, 8
        else:
            block_m, block_c = (32, 64) if wide else (64, 128)
            # where one chunk has all rows, 4 warps spill a few registers up to rank 16 on sm_90 and later; in many chunks, 8
            # do at rank 32 on sm_86
            num_warps = 8 if dropout or (rank == 16 and not wide) else 4
        if R != 16 and rank <= 64 and dropout and not wide:
            # philox beside a wide product: at rank 64 1.2 x DRAM bandwidth on A100 and H100, against 0.98 and 1.10 for
            # 64 x 128; at rank 32 1.24 and 1.14, against 1.15 and 1.07; at 8 1.38 and 1.22, against 1.34 and 1.16
            block_m, block_c = 32, 256
        if mixed and with_p:
            # b is three tiles of bfloat16: with 512 columns they spill, on gfx942 with 256
            block_m, block_c, num_warps = 32, 128 if target.capability is None else 256, 8
        elif mixed and rank == 16:
            # parts of s are made once for more columns
            block_m, block_c, num_warps = 16 if dropout else 32, 256, 8
        elif mixed and target.capability not in (90, 100):
            # 4 warps spill rank 64 beside 128 columns on sm_80, and beside 64 with a mask
            block_m, block_c, num_warps = (32, 128, 8) if dropout else (32, 64, 4)
        elif mixed and dropout:
            block_m, block_c, num_warps = 32, 128, 4
        if rank > 64:
            block_m, block_c, num_warps = 32, 32 if wide else block_c, 8
            if mixed and dropout and aligned:
                block_m, block_c = 64, 128  # enough bytes in flight
        num_stages = 2
        if not aligned:
            # elements of 2 bytes are not copied asynchronously, so that a second buffer only takes registers
            block_c, num_warps, num_stages = block_c // 2, 8, 1
        chunk_m = 1024
        while chunk_m > _MIN_CHUNK_M and 4 * cdiv(M, chunk_m) * cdiv(C, block_c) < 3 * target.sms:
            chunk_m //= 2
        return cls(block_m, block_c, chunk_m, num_warps, num_stages)


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """One tile of y a program, ``group`` rows of tiles at a time."""

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    group: int = 8
    num_warps: int = 8
    num_stages: int = 3

    @classmethod
    def choose(cls, R: int, *, aligned: bool, mixed: bool = False) -> GemmConfig:
        """Shorter steps if operands are read by elements; fewer columns beside the parts of a wide factor."""
        block_n = 64 if mixed and block_r(R) > 32 else 128
        return cls(block_n=block_n, block_k=64 if aligned else 32)


def one_dy_pass(R: int, *, target: Target, mixed: bool = False) -> bool:
    """Whether dB and ds come from one pass over dy rather than from two.

    Rank 32 spills in one at any tile on gfx942, and everywhere if the factor is float32 beside 16 bits.
    """
    return block_r(R) <= (16 if mixed or target.capability is None else _DY_PASS_RANK)


def fuses_gemm(N: int, K: int, *, itemsize: int, target: Target) -> bool:
    """Whether ``gemm_lora`` replaces expand and the library's GEMM.

    Only for small layers, where the two are equal or launches dominate, unless a calibration of the GPU says otherwise; a
    pointer-based Triton GEMM is not competitive in float32 or on sm_100, and on sm_75 it has no tensor cores.
    """
    capability, width = target.capability or 80, target.calibration.fused_width
    return itemsize == 2 and max(N, K) <= width and 80 <= capability != 100
