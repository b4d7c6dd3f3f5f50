"""Pieces that Triton kernels share. Imports triton: only ``kernels.py`` files import this one."""

import triton
import triton.language as tl


@triton.jit
def kept(seed, rows, column, groups, threshold, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """``Bool[BLOCK_M, BLOCK_C]``: which elements the dropout rule of ``dropout.py`` keeps.

    The rule does not depend on a tile size, so every kernel computes the same mask. One call of philox gives the draws of 8
    elements: 11 instructions for each element, against 58 with ``tl.rand``.

    Args:
        seed: 63 bits.
        rows: ``Int32[BLOCK_M]``, the row numbers.
        column: The first column, a multiple of 8; BLOCK_C is one too.
        groups: ``ceil(columns / 8)`` of the whole tensor.
        threshold: A draw below it drops the element.
    """
    counter = rows[:, None] * groups + (column // 8 + tl.arange(0, BLOCK_C // 8))[None, :]
    word0, word1, word2, word3 = tl.randint4x(seed, counter, n_rounds=7)
    # join makes its operands the new last axis, so this order gives words 0 1 2 3 of each group
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    words = tl.reshape(words, (BLOCK_M, BLOCK_C // 2))
    draws = tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF)
    return tl.reshape(draws, (BLOCK_M, BLOCK_C)) >= threshold


@triton.jit
def assume_multiple_of(n, STEP: tl.constexpr):
    """``n``, which must be a multiple of STEP, in a form that tells the compiler about this divisibility.

    Triton's launcher tells the compiler about multiples of 16 only. With this form, rows of 8 or 24 ranks are accessed by 128
    bits. Otherwise they are accessed element by element, which needs more registers for addresses.
    """
    return n // STEP * STEP


@triton.jit
def _bfloat16_parts(v):
    """Three bfloat16 tiles whose sum is the float32 tile ``v``. The sum is exact: 24 significant bits are three times 8."""
    high = v.to(tl.bfloat16)
    rest = v - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return high, middle, low


@triton.jit
def mixed_dot(a, b, acc, PRECISION: tl.constexpr):
    """``a b + acc`` of two tiles, each an activation or a factor. A factor may be float32 while activations are 16-bit.

    In that case float32 operands are split into bfloat16 parts, whose products run on tensor cores on every GPU. With a
    bfloat16 activation a float32 factor costs two more products and loses no precision, and the large tile stays in 16 bits.

    Args:
        a: ``[M, K]``.
        b: ``[K, N]``.
        acc: ``Float32[M, N]``.
        PRECISION: How two float32 tiles are multiplied: a value of ``tl.dot``, or ``"halves"``, with an error of 2⁻¹⁶.
    """
    if a.dtype == b.dtype:
        if a.dtype != tl.float32:
            acc = tl.dot(a, b, acc)
        elif PRECISION == "halves":
            a_high, a_low, _ = _bfloat16_parts(a)
            b_high, b_low, _ = _bfloat16_parts(b)
            acc = tl.dot(a_high, b_high, tl.dot(a_high, b_low, tl.dot(a_low, b_high, acc)))
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    elif a.dtype == tl.bfloat16:
        high, middle, low = _bfloat16_parts(b)
        acc = tl.dot(a, high, tl.dot(a, middle, tl.dot(a, low, acc)))
    elif b.dtype == tl.bfloat16:
        high, middle, low = _bfloat16_parts(a)
        acc = tl.dot(high, b, tl.dot(middle, b, tl.dot(low, b, acc)))
    elif a.dtype == tl.float16:
        # 11 significant bits fit two parts; the two smallest products are below the last bit of the sum and are omitted
        a_high, a_low, _ = _bfloat16_parts(a.to(tl.float32))
        high, middle, low = _bfloat16_parts(b)
        acc = tl.dot(a_high, middle, tl.dot(a_low, middle, tl.dot(a_high, low, acc)))
        acc = tl.dot(a_high, high, tl.dot(a_low, high, acc))
    else:
        high, middle, low = _bfloat16_parts(a)
        b_high, b_low, _ = _bfloat16_parts(b.to(tl.float32))
        acc = tl.dot(middle, b_high, tl.dot(middle, b_low, tl.dot(low, b_high, acc)))
        acc = tl.dot(high, b_high, tl.dot(high, b_low, acc))
    return acc


@triton.jit
def grouped_tile(program, rows, columns, GROUP: tl.constexpr):
    """Row and column of a GEMM's tile. GROUP rows of tiles are finished before the next ones, so that L2 holds both operands."""
    size = GROUP * columns
    first = program // size * GROUP
    height = tl.minimum(rows - first, GROUP)
    return first + program % size % height, program % size // height


@triton.jit
def _sigmoid(v):
    # exp2, because exp adds instructions that handle denormals
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * v))


@triton.jit
def activation(v, ACT: tl.constexpr):
    """``act(v)`` and ``act'(v)`` of a float32 tile. If a caller does not use one of them, the compiler removes its code.

    Args:
        v: Any finite value, however large.
        ACT: ``"silu"``, ``"gelu"``, ``"gelu_tanh"``, ``"relu"``, ``"tanh"`` or ``"identity"``.
    """
    if ACT == "silu":
        share = _sigmoid(v)
        a = v * share
        slope = share * (1.0 + v * (1.0 - share))
    elif ACT == "gelu":
        # erf by formula 7.1.26 of Abramowitz and Stegun, with an error of at most 1.5e-7; the library's takes twice the time
        bell = tl.exp2(-0.7213475204444817 * v * v)
        t = 1.0 / (1.0 + 0.23164188 * tl.abs(v))
        series = 1.061405429 * t - 1.453152027
        series = (series * t + 1.421413741) * t - 0.284496736
        tail = 0.5 * bell * t * (series * t + 0.254829592)
        share = tl.where(v < 0, tail, 1.0 - tail)
        a = v * share
        slope = share + v * (0.3989422804014327 * bell)
    elif ACT == "gelu_tanh":
        # 0.5 (1 + tanh u) is sigmoid(2 u), which has no cancellation; for |v| above 16 it is 0 or 1
        near = tl.clamp(v, -16.0, 16.0)
        square = near * near
        share = _sigmoid(1.5957691216057308 * near * (1.0 + 0.044715 * square))
        a = v * share
        steep = 1.5957691216057308 * (1.0 + 0.134145 * square)
        slope = share * (1.0 + near * (1.0 - share) * steep)
    elif ACT == "relu":
        # a comparison, because a maximum on a GPU does not propagate NaN
        a = tl.where(v < 0, 0.0, v)
        slope = tl.where(v > 0, 1.0, 0.0)
    elif ACT == "tanh":
        # not libdevice's tanh, which the interpreter does not have
        e = tl.exp2(-2.8853900817779268 * tl.abs(v))
        a = tl.where(v < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
        slope = 1.0 - a * a
    else:
        tl.static_assert(ACT == "identity")
        a = v
        slope = v * 0.0 + 1.0
    return a, slope
