"""Pieces that Triton kernels share. Imports triton: only ``kernels.py`` files import this one."""

import triton
import triton.language as tl


@triton.jit
def kept(seed, rows, column, groups, threshold, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """``Bool[BLOCK_M, BLOCK_C]``: which elements the dropout rule of ``dropout.py`` keeps.

    The rule does not mention a tile size, so every kernel makes the same mask. One call of philox serves 8 elements: 11
    instructions an element, against 58 for ``tl.rand``.

    Args:
        seed: 63 bits.
        rows: ``Int32[BLOCK_M]``.
        column: The first, a multiple of 8; so is BLOCK_C.
        groups: ``ceil(columns / 8)`` of the whole tensor.
        threshold: Draws below it drop.
    """
    counter = rows[:, None] * groups + (column // 8 + tl.arange(0, BLOCK_C // 8))[None, :]
    word0, word1, word2, word3 = tl.randint4x(seed, counter, n_rounds=7)
    # joining puts the later operand into the faster axis, so this order makes them words 0 1 2 3 of each group
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    words = tl.reshape(words, (BLOCK_M, BLOCK_C // 2))
    draws = tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF)
    return tl.reshape(draws, (BLOCK_M, BLOCK_C)) >= threshold


@triton.jit
def grouped_tile(program, rows, columns, GROUP: tl.constexpr):
    """Row and column of a GEMM's tile: GROUP rows of tiles are finished before the next, so that L2 serves both operands."""
    size = GROUP * columns
    first = program // size * GROUP
    height = tl.minimum(rows - first, GROUP)
    return first + program % size % height, program % size // height
