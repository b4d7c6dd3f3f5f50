"""Launch configurations of the rank-r passes, chosen by pure functions of numbers; the machine-code tests compile each one."""

from __future__ import annotations

from dataclasses import dataclass

from peftkit_kernels.core.launch import Target, cdiv

MAX_RANK = 512
RANK_TILE = 128
"""The ranks that a program holds in registers. The passes compute more ranks in tiles of this many."""
_DY_PASS_RANK = 32
"""Up to this rank one pass over dy computes dB and ds. Its partial sums move 4 R (1 / 512 + 1 / 1024) times the elements of dy: 37% at
R = 32. At 64, where registers halve the column block, it would be 125%, more than a second read of dy."""
_MIN_STEPS = 4
"""The least number of blocks of K in each program of a split shrink; with fewer, pipelining the loads does not help."""
_MIN_CHUNK_M = 256


def block_r(R: int) -> int:
    """The rank padded to a power of two, at least 16, as ``tl.dot`` needs."""
    return max(16, 1 << (R - 1).bit_length())


def looped_ranks(R: int) -> int:
    """The ranks of each step of a kernel that loops over them. The sum over several steps needs registers of its own."""
    return R if R <= RANK_TILE else RANK_TILE // 2


def rank_tiles(R: int) -> list[slice]:
    """The tiles of ``R`` ranks."""
    return [slice(start, start + RANK_TILE) for start in range(0, R, RANK_TILE)]


@dataclass(frozen=True, slots=True)
class ShrinkConfig:
    """A program computes ``block_m`` rows; ``splits`` programs share the K of one row block."""

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
        """Share K among programs if row blocks alone would fill less than three quarters of the GPU.

        ``mixed`` means a float32 factor with a 16-bit x, here and below.
        """
        wide = itemsize == 4
        block_k = 32 if wide else 64 if dropout or block_r(R) > 32 else 128
        block_m = 64
        if not aligned:
            block_k //= 2
        elif block_r(R) == 64 and dropout and not wide:
            # philox together with a wide product: 1.11 x DRAM bandwidth on A100, against 1.02 for 64 x 64
            block_m, block_k = 128, 32
        # 4 warps spill a few registers at rank 32 or with dropout in exact float32 on sm_90; and on sm_120 at rank 128 if x is
        # read element by element
        more = dropout or block_r(R) > 16 if wide else block_r(R) > 64 and not aligned
        num_warps = 8 if more else 4
        if block_k == 128 and target.capability not in (None, 90, 100):
            # 4 warps spill a few registers, at rank 16 on sm_120 and at rank 8 on sm_80 to sm_89, where each warp computes its
            # own products
            num_warps = 8
        if mixed and aligned and target.capability not in (90, 100):
            # each warp splits the factor's tile again: with 16 rows for each warp the pass reaches 0.6 of DRAM bandwidth on A100
            block_k = 64 if block_r(R) <= 32 else 32
            block_m, num_warps = (128, 8 if dropout else 4) if block_r(R) == 64 else (64, 4)
        elif mixed and aligned and block_r(R) >= 64 and (block_r(R) > 64 or not dropout):
            # more than 1.1 x DRAM bandwidth on H100, against 1.06 for 64 x 64; at rank 128, for enough bytes in flight
            block_m, num_warps = 128, 8
        programs = cdiv(M, block_m)
        splits = 1
        if 4 * programs < 3 * target.sms:
            splits = min(cdiv(target.sms, programs), cdiv(cdiv(K, block_k), _MIN_STEPS))
        return cls(block_m, block_k, splits, num_warps)


@dataclass(frozen=True, slots=True)
class ExpandConfig:
    """Each program computes one tile of y."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 1

    @classmethod
    def choose(
        cls, R: int, *, itemsize: int, dropout: bool, aligned: bool, mixed: bool = False
    ) -> ExpandConfig:
        """Narrow tiles if the registers would not hold a wide tile together with its mask or with the parts of a float32 factor."""
        if itemsize == 4 and block_r(R) >= 64:
            # without tensor cores the compiler unrolls the whole product, and 64 x 64 spills kilobytes
            return cls(32, 32, num_warps=8)
        narrow = dropout or itemsize == 4 or block_r(R) > (32 if mixed else 64)
        block_n = 64 if narrow else 128
        return cls(64, block_n if aligned else block_n // 2)


@dataclass(frozen=True, slots=True)
class TallConfig:
    """A program owns ``chunk_m`` rows and ``block_c`` columns, and reads ``block_m`` rows at a time."""

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
        """Long chunks, because they make few partial sums; shorter ones if too little of the GPU would be filled."""
        rank, wide = block_r(R), itemsize == 4
        if with_p:
            # unless 8 divides R, rows of s and b are read element by element, and 512 columns spill kilobytes
            block_m, block_c, num_warps = 32, 128 if wide else 256 if R % 8 else 512, 8
        else:
            block_m, block_c = (32, 64) if wide else (64, 128)
            # with one chunk for all rows, 4 warps spill a few registers up to rank 16 on sm_90 and later; with many chunks, 8
            # warps spill at rank 32 on sm_86
            num_warps = 8 if dropout or (rank == 16 and not wide) else 4
        if R != 16 and rank <= 64 and dropout and not wide:
            # philox together with a wide product, in units of DRAM bandwidth on A100 and H100: at rank 64 1.2 on both, against
            # 0.98 and 1.10 for 64 x 128; at rank 32 1.24 and 1.14, against 1.15 and 1.07; at rank 8 1.38 and 1.22, against
            # 1.34 and 1.16
            block_m, block_c = 32, 256
        if mixed and with_p:
            # b becomes three bfloat16 tiles, which spill with 512 columns (on gfx942 with 256)
            block_m, block_c, num_warps = 32, 128 if target.capability is None else 256, 8
        elif mixed and rank == 16:
            # more columns in each program, so that s is split into its parts less often
            block_m, block_c, num_warps = 16 if dropout else 32, 256, 8
        elif mixed and target.capability not in (90, 100):
            # 4 warps spill at rank 64 with 128 columns on sm_80, and with 64 columns and a mask
            block_m, block_c, num_warps = (32, 128, 8) if dropout else (32, 64, 4)
        elif mixed and dropout:
            block_m, block_c, num_warps = 32, 128, 4
        if rank > 64:
            block_m, block_c, num_warps = 32, 32 if wide else block_c, 8
            if mixed and dropout and aligned:
                block_m, block_c = 64, 128  # for enough bytes in flight
        num_stages, fill = 2, 3
        if target.capability == 90 and aligned and not (wide or mixed or dropout) and rank <= 64:
            # measured on an H100: 0.74 to 0.8 of the time of the tiles above, for 1024 to 14336 columns
            if not with_p:
                block_m, block_c, num_warps, num_stages = 64, 128, 4, 3
                fill = 6 if rank <= 32 else 3
            elif rank == 16 and R % 8 == 0:
                block_m, block_c, num_warps, num_stages = 64, 256, 4, 3
        if not aligned:
            # single elements of 2 bytes cannot be copied asynchronously, so a second buffer would only take registers
            block_c, num_warps, num_stages = block_c // 2, 8, 1
        chunk_m = 1024
        while (
            chunk_m > _MIN_CHUNK_M and 4 * cdiv(M, chunk_m) * cdiv(C, block_c) < fill * target.sms
        ):
            chunk_m //= 2
        return cls(block_m, block_c, chunk_m, num_warps, num_stages)


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """Each program computes one tile of y; ``group`` rows of tiles are finished before the next ones."""

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    group: int = 8
    num_warps: int = 8
    num_stages: int = 3

    @classmethod
    def choose(cls, R: int, *, aligned: bool, mixed: bool = False) -> GemmConfig:
        """Shorter steps if operands are read element by element; fewer columns if a float32 factor is split into parts."""
        block_n = 64 if mixed and block_r(R) > 32 else 128
        return cls(block_n=block_n, block_k=64 if aligned else 32)


def one_dy_pass(R: int, *, target: Target, mixed: bool = False) -> bool:
    """Whether one pass over dy computes both dB and ds, instead of two passes.

    At rank 32 one pass spills with any tile on gfx942, and on every GPU if the factor is float32 and dy is 16-bit.
    """
    return block_r(R) <= (16 if mixed or target.capability is None else _DY_PASS_RANK)


def fuses_gemm(N: int, K: int, *, itemsize: int, target: Target) -> bool:
    """Whether ``gemm_lora`` replaces expand and the library's GEMM.

    Only for small layers, for which both are equally fast or the launches dominate; a calibration of the GPU may change the
    limit. A pointer-based Triton GEMM is slower than the library's in float32 and on sm_100, and on sm_75 it has no tensor cores.
    """
    capability, width = target.capability or 80, target.calibration.fused_width
    return itemsize == 2 and max(N, K) <= width and 80 <= capability != 100
