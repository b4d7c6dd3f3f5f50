"""NF4 storage as Triton kernels, and the functions with which other kernels decode a tile.

Packed bytes are read as 32-bit words of eight codes. Element j of a word is in byte j // 2, in its high nibble if j is even.
Indices of words are int32 (a weight has less than 2³⁴ elements), those of elements int64.
"""

import struct

import triton
import triton.language as tl

from peftkit_kernels.storage.nf4 import weight

LEVELS = tl.constexpr(weight.LEVELS)
MIDPOINTS = tl.constexpr(tuple(weight.midpoints(weight.level_table()).tolist()))
SMALLEST_ABSMAX_BITS = tl.constexpr(
    struct.unpack("<i", struct.pack("<f", weight.SMALLEST_ABSMAX))[0]
)
"""The bits of the float32 number. Triton would treat the number itself as a float64, because it is subnormal in float32."""


@triton.jit
def level_table(dtype: tl.constexpr):
    """``[16]``: the levels of the codes, in registers, so that ``tl.gather`` reads them without a memory access."""
    code = tl.arange(0, 16)
    table = tl.zeros((16,), tl.float32)
    for k in tl.static_range(16):
        table = tl.where(code == k, LEVELS[k], table)
    return table.to(dtype)


@triton.jit
def decode_words(words, table, SIZE: tl.constexpr):
    """``[SIZE, 8]``: the levels of ``Int32[SIZE]`` words, in order."""
    j = tl.arange(0, 8)
    shift = (j // 2) * 8 + 4 - (j % 2) * 4
    code = (words[:, None] >> shift[None, :]) & 15
    return tl.reshape(tl.gather(table, tl.reshape(code, (SIZE * 8,)), 0), (SIZE, 8))


@triton.jit
def block_absmax(
    absmax_ptr, code_ptr, nested_ptr, offset_ptr, block, mask,
    NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr,
):  # fmt: skip
    """``Float32``: the maxima of some blocks, decoded if they are stored in 8 bits; product and sum are each rounded."""
    if NESTED:
        code = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        absmax = tl.load(code_ptr + code, mask=mask, other=0.0)
        absmax *= tl.load(nested_ptr + block // NESTED_BLOCK, mask=mask, other=0.0)
        absmax += tl.load(offset_ptr)
    else:
        absmax = tl.load(absmax_ptr + block, mask=mask, other=0.0)
    return absmax


@triton.jit
def dequantize_kernel(
    packed_ptr,  # words, or bytes[ceil(numel / 2)] if WORDS is false
    absmax_ptr, code_ptr, nested_ptr, offset_ptr,  # [blocks]; [256], [blocks / NESTED_BLOCK], [] or None
    row_scale_ptr, out_ptr,  # [N] or None  out[N, K] by rows
    numel, K, row_words, stride_om,  # row_words: K // 8
    WORDS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, HAS_SCALE: tl.constexpr,
    NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``out = level · absmax (· row_scale)``, each product rounded to float32. Program i owns words i BLOCK to (i + 1) BLOCK.

    WHOLE means that rows are whole words. ROWS means that the row of an element is needed, because rows have gaps between them
    or are scaled.
    """
    # 1. words of eight codes
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = word.to(tl.int64) * 8
    mask = first < numel
    if WORDS:
        words = tl.load(packed_ptr + word, mask=mask, other=0)
    else:
        i = tl.arange(0, 4)
        offs_b = (word.to(tl.int64) * 4)[:, None] + i[None, :]
        parts = tl.load(packed_ptr + offs_b, mask=offs_b * 2 < numel, other=0).to(tl.int32)
        words = tl.sum(parts << (i * 8)[None, :], 1)
    # 2. their values; all elements of a word are in one block
    block = word // (BLOCKSIZE // 8)
    absmax = block_absmax(
        absmax_ptr, code_ptr, nested_ptr, offset_ptr, block, mask, NESTED, NESTED_BLOCK
    )
    values = decode_words(words, level_table(tl.float32), BLOCK) * absmax[:, None]
    # 3. the positions of the elements in out, the scales of their rows, and the store
    j = tl.arange(0, 8)
    offs = first[:, None] + j[None, :]
    mask_out = offs < numel
    if ROWS:
        if WHOLE:
            row = word // row_words
            column = (word - row * row_words) * 8
            offs = (row.to(tl.int64) * stride_om + column)[:, None] + j[None, :]
            if HAS_SCALE:
                values *= tl.load(row_scale_ptr + row, mask=mask, other=0.0)[:, None]
        else:
            row = first // K
            column = (first - row * K).to(tl.int32)[:, None] + j[None, :]
            rows = row[:, None] + column // K
            offs = rows * stride_om + column % K
            if HAS_SCALE:
                values *= tl.load(row_scale_ptr + rows, mask=mask_out, other=0.0)
    tl.store(out_ptr + offs, values.to(out_ptr.dtype.element_ty), mask=mask_out)


@triton.jit
def quantize_kernel(
    weight_ptr, packed_ptr, absmax_ptr,  # weight[numel]  packed[size]  absmax[blocks]
    numel, size,  # size: ceil(numel / 2)
    BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Codes and block maxima: a code is the number of midpoints strictly below ``w · (1 / absmax)``. A program owns BLOCKS blocks."""
    # 1. the blocks of this program
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    offs = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    mask = offs < numel
    w = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    # 2. maxima; the bit patterns of magnitudes, read as integers, have the same order, with NaN above every number
    bits = tl.max(w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    tl.store(absmax_ptr + block, bits.to(tl.float32, bitcast=True), mask=block * BLOCKSIZE < numel)
    # 3. codes
    divisor = tl.maximum(bits, SMALLEST_ABSMAX_BITS).to(tl.float32, bitcast=True)
    scaled = w * tl.math.div_rn(1.0, divisor)[:, None]
    code = tl.zeros((BLOCKS, BLOCKSIZE), tl.int32)
    for k in tl.static_range(15):
        # in this form NaN counts as above every midpoint, as in torch.bucketize
        code += tl.where(scaled <= MIDPOINTS[k], 0, 1)
    # 4. two codes in each byte; 7 is the code of zero
    code = tl.where(mask, code, 7)
    even, odd = tl.split(tl.reshape(code, (BLOCKS, BLOCKSIZE // 2, 2)))
    offs_b = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed_ptr + offs_b, (even << 4 | odd).to(tl.uint8), mask=offs_b < size)
