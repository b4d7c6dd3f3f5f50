"""Products of few rows with a quantised weight, which is decoded in the loop: x ``[M, K]``, s = drop(x) Aᵀ ``[M, R]``, B ``[N, R]``.

Program (i, j, k) owns the columns of tile i, the j-th share of K and the rows of tile k. With several shares y is
``Float32[shares, M, N]`` and must be summed in order; the first share includes update and bias. Offsets of rows and words of
the weight are int64.
"""

import triton
import triton.language as tl

from peftkit_kernels.core.tiles import mixed_dot
from peftkit_kernels.storage.nf4.kernels import block_absmax, decode_words, level_table


@triton.jit
def _finish(
    acc, s_ptr, b_ptr, bias_ptr, y_ptr, factor, offs_m, offs_n, share, M, N, R,
    stride_sm, stride_bn, stride_br, stride_ym,
    HAS_LORA: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ``factor · s bᵀ + bias`` if this is the first share of K, round once and store."""
    mask_m, mask_n = offs_m < M, offs_n < N
    if share == 0:
        if HAS_LORA:
            offs_r = tl.arange(0, BLOCK_R)
            mask_r = offs_r < R
            s = tl.load(
                s_ptr + offs_m.to(tl.int64)[:, None] * stride_sm + offs_r[None, :],
                mask=mask_m[:, None] & mask_r[None, :],
                other=0.0,
            )
            b = tl.load(
                b_ptr + offs_n[None, :] * stride_bn + offs_r[:, None] * stride_br,
                mask=mask_n[None, :] & mask_r[:, None],
                other=0.0,
            )
            update = tl.zeros((s.shape[0], b.shape[1]), tl.float32)
            acc += mixed_dot(s, b, update, PRECISION) * factor
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    offs_y = (share.to(tl.int64) * M + offs_m)[:, None] * stride_ym + offs_n[None, :]
    tl.store(y_ptr + offs_y, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def nf4_small_m_kernel(
    x_ptr, packed_ptr,  # x[M, K]  packed[N, K / 8], words of eight codes
    absmax_ptr, code_ptr, nested_ptr, offset_ptr,
    s_ptr, b_ptr, bias_ptr, y_ptr,
    factor, M, N, K, R, steps,  # steps: blocks of K in each share
    stride_xm, stride_sm, stride_bn, stride_br, stride_ym,
    HAS_LORA: tl.constexpr, HAS_BIAS: tl.constexpr,
    NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``y = x Wᵀ + factor · s bᵀ + bias`` for a 4-bit W whose rows are whole steps; a step of a row is inside one block of W.

    So a block's maximum multiplies the step's sums ``[M, BLOCK_N]`` and not every weight. Levels are rounded to the dtype of x.
    """
    # 1. which tile and which share of K this program owns
    share = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m, mask_n = offs_m < M, offs_n < N
    offs_k = tl.arange(0, BLOCK_K)
    offs_w = tl.arange(0, BLOCK_K // 8)
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    packed_rows = packed_ptr + offs_n.to(tl.int64)[:, None] * (K // 8)
    table = level_table(x_ptr.dtype.element_ty)
    # 2. one step at a time: decode the codes, multiply, scale the sums with the blocks' maxima
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(share * steps, tl.minimum(K // BLOCK_K, (share + 1) * steps)):
        # 7 is the code of zero, so padding decodes to 0
        words = tl.load(
            packed_rows + (step * (BLOCK_K // 8) + offs_w)[None, :],
            mask=mask_n[:, None],
            other=0x77777777,
        )
        levels = decode_words(
            tl.reshape(words, (BLOCK_N * BLOCK_K // 8,)), table, BLOCK_N * BLOCK_K // 8
        )
        levels = tl.reshape(levels, (BLOCK_N, BLOCK_K))
        x = tl.load(x_rows + (step * BLOCK_K + offs_k)[None, :], mask=mask_m[:, None], other=0.0)
        block = (offs_n * (K // BLOCK_K) + step) // (BLOCKSIZE // BLOCK_K)
        absmax = block_absmax(
            absmax_ptr, code_ptr, nested_ptr, offset_ptr, block, mask_n, NESTED, NESTED_BLOCK
        )
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc += mixed_dot(x, tl.trans(levels), sums, PRECISION) * absmax[None, :]
    # 3. update and bias, and the store
    _finish(
        acc, s_ptr, b_ptr, bias_ptr, y_ptr, factor, offs_m, offs_n, share, M, N, R,
        stride_sm, stride_bn, stride_br, stride_ym, HAS_LORA, HAS_BIAS, BLOCK_R, PRECISION,
    )  # fmt: skip


@triton.jit
def int8_small_m_kernel(
    x_ptr, codes_ptr, row_absmax_ptr,  # x[M, K]  codes[N, K] by strides  [N]
    s_ptr, b_ptr, bias_ptr, y_ptr,
    factor, M, N, K, R, steps,
    stride_xm, stride_cn, stride_ck, stride_sm, stride_bn, stride_br, stride_ym,
    HAS_LORA: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``y = x Wᵀ + factor · s bᵀ + bias`` for an 8-bit W: codes are exact in the dtype of x, and the scale of a row multiplies the sum."""
    # 1. which tile and which share of K this program owns
    share = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m, mask_n = offs_m < M, offs_n < N
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    code_rows = codes_ptr + offs_n.to(tl.int64)[:, None] * stride_cn
    # 2. product with the codes, over this share of K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = share * steps * BLOCK_K
    for k in range(first, tl.minimum(K, first + steps * BLOCK_K), BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        codes = tl.load(
            code_rows + offs_k.to(tl.int64)[None, :] * stride_ck,
            mask=mask_n[:, None] & mask_k[None, :],
            other=0,
        )
        x = tl.load(x_rows + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        codes = tl.trans(codes.to(x_ptr.dtype.element_ty))
        acc = mixed_dot(x, codes, acc, PRECISION)
    # 3. scales, update and bias, and the store
    row_absmax = tl.load(row_absmax_ptr + offs_n, mask=mask_n, other=0.0)
    acc *= tl.math.div_rn(row_absmax, 127.0)[None, :]
    _finish(
        acc, s_ptr, b_ptr, bias_ptr, y_ptr, factor, offs_m, offs_n, share, M, N, R,
        stride_sm, stride_bn, stride_br, stride_ym, HAS_LORA, HAS_BIAS, BLOCK_R, PRECISION,
    )  # fmt: skip
