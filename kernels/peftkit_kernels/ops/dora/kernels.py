"""The row norms of an updated weight, which is read once in any storage, and the gradient of a magnitude.

W ``[N, K]``, A ``[R, K]``, B ``[N, R]``, y and dy ``[M, N]``. Offsets of rows and of words are int64.
"""

import triton
import triton.language as tl

from peftkit_kernels.storage.nf4.kernels import block_absmax, decode_words, level_table


@triton.jit
def norm_kernel(
    w_ptr,  # w[N, K] by strides: floating-point numbers, 8-bit codes, or words of eight 4-bit codes
    absmax_ptr, code_ptr, nested_ptr, offset_ptr,  # block maxima of a 4-bit w; absmax[N] of an 8-bit w; or None
    a_ptr, b_ptr, update_ptr, norm_ptr,  # a[R, K], b[N, R] by strides  update[N] = |scale · B A|²  norm[N]
    scale, N, K, R,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    STORAGE: tl.constexpr,  # "dense", "nf4" or "int8"
    NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``norm = |W + scale · B A|`` by rows: ``|W|² + 2 scale · B ∘ (W Aᵀ) + scale² · B (A Aᵀ) ∘ B``, each summed over the row."""
    # 1. which rows this program owns
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    SIZE: tl.constexpr = BLOCK_N * BLOCK_K // 8
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    rows = offs_n.to(tl.int64)[:, None]
    if STORAGE == "nf4":
        table = level_table(tl.float32)
    if STORAGE == "int8":
        # the loops use the codes; one step of a code is row_absmax / 127
        step = tl.math.div_rn(tl.load(absmax_ptr + offs_n, mask=mask_n, other=0.0), 127.0)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    products = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(TILES):
        offs_r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        # 2. W Aᵀ in one pass over W for each tile of ranks, with the first also |W|²
        cross = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < K
            if STORAGE == "nf4":
                offs_w = k // 8 + tl.arange(0, BLOCK_K // 8)
                mask_w = mask_n[:, None] & (offs_w < K // 8)[None, :]
                word = rows * (K // 8) + offs_w[None, :]
                # 7 is the code of zero, so padding decodes to 0
                words = tl.load(w_ptr + word, mask=mask_w, other=0x77777777)
                block = word // (BLOCKSIZE // 8)
                absmax = block_absmax(
                    absmax_ptr,
                    code_ptr,
                    nested_ptr,
                    offset_ptr,
                    block,
                    mask_w,
                    NESTED,
                    NESTED_BLOCK,
                )
                levels = decode_words(tl.reshape(words, (SIZE,)), table, SIZE)
                wide = tl.reshape(levels * tl.reshape(absmax, (SIZE,))[:, None], (BLOCK_N, BLOCK_K))
                operand = wide.to(dtype)
            else:
                w = tl.load(
                    w_ptr + rows * stride_wn + offs_k.to(tl.int64)[None, :] * stride_wk,
                    mask=mask_n[:, None] & mask_k[None, :],
                    other=0,
                )
                wide = w.to(tl.float32)
                operand = w.to(dtype)
            a = tl.load(
                a_ptr + offs_r[None, :] * stride_ar + offs_k[:, None] * stride_ak,
                mask=mask_r[None, :] & mask_k[:, None],
                other=0.0,
            )
            cross = tl.dot(operand, a, cross, input_precision=PRECISION)
            squares += tl.where(tile == 0, tl.sum(wide * wide, 1), 0.0)
        if STORAGE == "int8":
            cross *= step[:, None]
        # 3. B ∘ (W Aᵀ)
        mask_b = mask_n[:, None] & mask_r[None, :]
        b_ptrs = b_ptr + rows * stride_bn + offs_r[None, :] * stride_br
        b = tl.load(b_ptrs, mask=mask_b, other=0.0).to(tl.float32)
        products += tl.sum(cross * b, 1)
    if STORAGE == "int8":
        squares *= step * step
    squares += 2.0 * scale * products
    squares += tl.load(update_ptr + offs_n, mask=mask_n, other=0.0)
    # 4. the root; a sum that rounding made negative counts as 0, and NaN stays NaN
    norm = tl.math.sqrt_rn(tl.where(squares < 0.0, 0.0, squares))
    tl.store(norm_ptr + offs_n, norm, mask=mask_n)


@triton.jit
def magnitude_grad_kernel(
    dy_ptr, y_ptr, bias_ptr, g_ptr,  # dy[M, N]  y[M, N]  bias[N] or None  g[row chunks, N]
    M, N, chunk_m,
    stride_dm, stride_ym,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``g[i] = Σ dy ∘ (y - bias)`` over row chunk i. Program (i, j) owns row chunk i and column block j."""
    pid_m = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    bias = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    first = pid_m * chunk_m
    for m in range(first, tl.minimum(M, first + chunk_m), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & mask_n[None, :]
        rows = offs_m.to(tl.int64)[:, None]
        dy = tl.load(dy_ptr + rows * stride_dm + offs_n[None, :], mask=mask, other=0.0)
        y = tl.load(y_ptr + rows * stride_ym + offs_n[None, :], mask=mask, other=0.0)
        acc += tl.sum(dy.to(tl.float32) * (y.to(tl.float32) - bias[None, :]), 0)
    tl.store(g_ptr + pid_m.to(tl.int64) * N + offs_n, acc, mask=mask_n)
