"""The rank-r passes as Triton kernels: x ``[M, K]``, A ``[R, K]``, B ``[N, R]``, s = drop(x) Aᵀ and ds ``[M, R]``.

Factors, s and ds have one dtype: that of x and y, or float32 if x and y are 16-bit.

Masks pad ranks to BLOCK_R. STEP divides the rank and the row strides of s, ds and p; STEP_A and STEP_B divide a stride of a
factor. Offsets of rows are int64. Offsets of columns and factors (R K and N R stay below 2³¹) and the counters of the dropout
rule (M K < 2³⁴) are int32.
"""

import triton
import triton.language as tl

from peftkit_kernels.core.tiles import assume_multiple_of, grouped_tile, kept, mixed_dot


@triton.jit(do_not_specialize=["seed", "threshold"])
def shrink_kernel(
    x_ptr, a_ptr, s_ptr,  # x[M, K]  a[R, K] by strides  s[splits * M, R]
    factor, seed, threshold,
    M, K, R, steps,  # steps: blocks of K in each program
    stride_xm, stride_ar, stride_ak, stride_sm,
    DROPOUT: tl.constexpr, STEP: tl.constexpr, STEP_A: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``s = factor · drop(x) aᵀ``; x is read once. Program (i, j) owns row block i and the j-th share of K."""
    # 1. which rows and which share of K this program owns
    R, stride_sm, stride_ak = (
        assume_multiple_of(R, STEP),
        assume_multiple_of(stride_sm, STEP),
        assume_multiple_of(stride_ak, STEP_A),
    )
    pid_m, pid_k = tl.program_id(0), tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    # 2. product with the factor, over this share of K
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    first = pid_k * steps * BLOCK_K
    for k in range(first, tl.minimum(K, first + steps * BLOCK_K), BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(x_rows + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        a = tl.load(
            a_ptr + offs_r[None, :] * stride_ar + offs_k[:, None] * stride_ak,
            mask=mask_r[None, :] & mask_k[:, None],
            other=0.0,
        )
        if DROPOUT:
            keep = kept(seed, offs_m, k, tl.cdiv(K, 8), threshold, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, 0.0).to(x_ptr.dtype.element_ty)
        acc = mixed_dot(x, a, acc, PRECISION)
    # 3. s, or this share's partial sum of it
    offs_s = (pid_k.to(tl.int64) * M + offs_m)[:, None] * stride_sm + offs_r[None, :]
    s = (acc * factor).to(s_ptr.dtype.element_ty)
    tl.store(s_ptr + offs_s, s, mask=mask_m[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["seed", "threshold"])
def expand_kernel(
    s_ptr, b_ptr, bias_ptr, y_ptr,  # s[M, R]  b[N, R] by strides  bias[N] or None  y[M, N]
    factor, seed, threshold,
    M, N, R,
    stride_sm, stride_bn, stride_br, stride_ym,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, ADD: tl.constexpr,
    STEP: tl.constexpr, STEP_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``y = mask ∘ (factor · s bᵀ) + bias``, added to y with ADD, for TILES tiles of BLOCK_R ranks.

    The mask is that of a dropout over y's columns.
    It runs *before* ``y.addmm_(x, Wᵀ)``: the GEMM then reads y back while its main loop runs. In the backward b is Aᵀ.
    """
    # 1. which tile of y this program owns
    R, stride_sm, stride_bn = (
        assume_multiple_of(R, STEP),
        assume_multiple_of(stride_sm, STEP),
        assume_multiple_of(stride_bn, STEP_B),
    )
    pid_n = tl.program_id(1)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    # 2. the update
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(TILES):
        offs_r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
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
        y = mixed_dot(s, b, y, PRECISION)
    y *= factor
    if DROPOUT:
        keep = kept(seed, offs_m, pid_n * BLOCK_N, tl.cdiv(N, 8), threshold, BLOCK_M, BLOCK_N)
        y = tl.where(keep, y, 0.0)
    # 3. bias and the old y, one rounding at the store
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if ADD:
        y += tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed", "threshold"])
def tall_kernel(
    x_ptr, s_ptr, b_ptr,  # x[M, C]  s[M, R]  b[C, R] by strides or None
    g_ptr, p_ptr,  # g[row chunks, R, C] by strides  p[column blocks * M, R] or None
    g_factor, p_factor, seed, threshold,
    M, C, R, chunk_m,  # chunk_m: rows of each program, a multiple of BLOCK_M
    stride_xm, stride_sm, stride_bc, stride_br, stride_gi, stride_gr, stride_gc,
    stride_pm,
    WITH_P: tl.constexpr, DROPOUT: tl.constexpr, STEP: tl.constexpr, STEP_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One pass over a tall x: ``g[i] = g_factor · sᵀ drop(x)`` and ``p[j] = p_factor · x b``.

    Program (i, j) owns row chunk i and column block j. With x = dy, s and b = B, g is dBᵀ and p is ds. With x and s = ds, g is
    dA. The product is sᵀ x and not xᵀ s, so that the large tile is not transposed: 39 registers against 51 at rank 16 on sm_80.
    """
    # 1. which rows and columns this program owns
    R, stride_sm, stride_pm = (
        assume_multiple_of(R, STEP),
        assume_multiple_of(stride_sm, STEP),
        assume_multiple_of(stride_pm, STEP),
    )
    stride_bc = assume_multiple_of(stride_bc, STEP_B)
    pid_m, pid_c = tl.program_id(0), tl.program_id(1)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R)
    mask_c, mask_r = offs_c < C, offs_r < R
    g = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if WITH_P:
        b = tl.load(
            b_ptr + offs_c[:, None] * stride_bc + offs_r[None, :] * stride_br,
            mask=mask_c[:, None] & mask_r[None, :],
            other=0.0,
        )
    # 2. one pass over the rows: p of each block of rows, g summed over all of them
    first = pid_m * chunk_m
    for m in range(first, tl.minimum(M, first + chunk_m), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask_s = mask_m[:, None] & mask_r[None, :]
        x = tl.load(
            x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_c[None, :],
            mask=mask_m[:, None] & mask_c[None, :],
            other=0.0,
        )
        s = tl.load(
            s_ptr + offs_m.to(tl.int64)[:, None] * stride_sm + offs_r[None, :],
            mask=mask_s,
            other=0.0,
        )
        if WITH_P:
            p = mixed_dot(x, b, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), PRECISION) * p_factor
            offs_p = (pid_c.to(tl.int64) * M + offs_m)[:, None] * stride_pm + offs_r[None, :]
            tl.store(p_ptr + offs_p, p.to(p_ptr.dtype.element_ty), mask=mask_s)
        if DROPOUT:
            keep = kept(seed, offs_m, pid_c * BLOCK_C, tl.cdiv(C, 8), threshold, BLOCK_M, BLOCK_C)
            x = tl.where(keep, x, 0.0).to(x_ptr.dtype.element_ty)
        g = mixed_dot(tl.trans(s), x, g, PRECISION)
    # 3. g of this chunk of rows
    offs_g = pid_m.to(tl.int64) * stride_gi
    offs_g += offs_r[:, None] * stride_gr + offs_c[None, :] * stride_gc
    g = (g * g_factor).to(g_ptr.dtype.element_ty)
    tl.store(g_ptr + offs_g, g, mask=mask_r[:, None] & mask_c[None, :])


@triton.jit
def sum_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr,  # x[count, M, N], float32 and contiguous
    y0_ptr, y1_ptr, y2_ptr, y3_ptr, y4_ptr, y5_ptr,  # y[M, N] by strides
    count0, count1, count2, count3, count4, count5,
    M0, M1, M2, M3, M4, M5,
    N0, N1, N2, N3, N4, N5,
    stride_ym0, stride_ym1, stride_ym2, stride_ym3, stride_ym4, stride_ym5,
    stride_yn0, stride_yn1, stride_yn2, stride_yn3, stride_yn4, stride_yn5,
    end0, end1, end2, end3, end4,  # the program after the last one of each sum
    BLOCK_M0: tl.constexpr, BLOCK_M1: tl.constexpr, BLOCK_M2: tl.constexpr,
    BLOCK_M3: tl.constexpr, BLOCK_M4: tl.constexpr, BLOCK_M5: tl.constexpr,
    BLOCK_N0: tl.constexpr, BLOCK_N1: tl.constexpr, BLOCK_N2: tl.constexpr,
    BLOCK_N3: tl.constexpr, BLOCK_N4: tl.constexpr, BLOCK_N5: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """Up to six independent ``y = Σ x`` over partial results; each program computes one tile of one of them."""
    pid = tl.program_id(0)
    if SUMS == 1:
        _sum_tile(x0_ptr, y0_ptr, count0, M0, N0, stride_ym0, stride_yn0, pid, BLOCK_M0, BLOCK_N0)
    else:
        if pid < end0:
            _sum_tile(
                x0_ptr, y0_ptr, count0, M0, N0, stride_ym0, stride_yn0, pid, BLOCK_M0, BLOCK_N0
            )
        if (pid >= end0) & (pid < end1):
            _sum_tile(
                x1_ptr,
                y1_ptr,
                count1,
                M1,
                N1,
                stride_ym1,
                stride_yn1,
                pid - end0,
                BLOCK_M1,
                BLOCK_N1,
            )
        if SUMS > 2:
            if (pid >= end1) & (pid < end2):
                _sum_tile(
                    x2_ptr,
                    y2_ptr,
                    count2,
                    M2,
                    N2,
                    stride_ym2,
                    stride_yn2,
                    pid - end1,
                    BLOCK_M2,
                    BLOCK_N2,
                )
        if SUMS > 3:
            if (pid >= end2) & (pid < end3):
                _sum_tile(
                    x3_ptr,
                    y3_ptr,
                    count3,
                    M3,
                    N3,
                    stride_ym3,
                    stride_yn3,
                    pid - end2,
                    BLOCK_M3,
                    BLOCK_N3,
                )
        if SUMS > 4:
            if (pid >= end3) & (pid < end4):
                _sum_tile(
                    x4_ptr,
                    y4_ptr,
                    count4,
                    M4,
                    N4,
                    stride_ym4,
                    stride_yn4,
                    pid - end3,
                    BLOCK_M4,
                    BLOCK_N4,
                )
        if SUMS > 5:
            if pid >= end4:
                _sum_tile(
                    x5_ptr,
                    y5_ptr,
                    count5,
                    M5,
                    N5,
                    stride_ym5,
                    stride_yn5,
                    pid - end4,
                    BLOCK_M5,
                    BLOCK_N5,
                )


@triton.jit
def _sum_tile(
    x_ptr, y_ptr,
    count, M, N,
    stride_ym, stride_yn,
    tile,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of ``y = Σ x``, added in a fixed order and rounded once."""
    wide_N = tl.zeros((), tl.int64) + N
    blocks = tl.cdiv(wide_N, BLOCK_N)
    offs_m = (tile // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tile % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    x_ptrs = x_ptr + offs_m[:, None] * N + offs_n[None, :]
    stride_xi = wide_N * M
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(count):
        acc += tl.load(x_ptrs, mask=mask, other=0.0)
        x_ptrs += stride_xi
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed", "threshold"])
def gemm_lora_kernel(
    x_ptr, w_ptr, s_ptr, b_ptr, bias_ptr, y_ptr,  # x[M, K]  w[N, K], b[N, R] by strides  y[M, N]
    factor, seed, threshold,
    M, N, K, R,
    stride_xm, stride_wn, stride_wk, stride_sm, stride_bn, stride_br, stride_ym,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, STEP: tl.constexpr, STEP_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``y = x wᵀ + mask ∘ (factor · s bᵀ) + bias``: a GEMM whose accumulator starts from the update.

    In the backward x = dy, w = Wᵀ, s = ds, b = Aᵀ, and the mask is that of a dropout over y's columns.
    """
    R, stride_sm, stride_bn = (
        assume_multiple_of(R, STEP),
        assume_multiple_of(stride_sm, STEP),
        assume_multiple_of(stride_bn, STEP_B),
    )
    # 1. which tile this program owns
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_n, mask_r = offs_m < M, offs_n < N, offs_r < R
    # 2. low-rank term into a float32 accumulator
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
    acc = mixed_dot(s, b, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION) * factor
    if DROPOUT:
        keep = kept(seed, offs_m, tile_n * BLOCK_N, tl.cdiv(N, 8), threshold, BLOCK_M, BLOCK_N)
        acc = tl.where(keep, acc, 0.0)
    # 3. base product into the same accumulator
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(
            x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_k[None, :],
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        offs_w = offs_n.to(tl.int64)[None, :] * stride_wn + offs_k.to(tl.int64)[:, None] * stride_wk
        w = tl.load(w_ptr + offs_w, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        acc = mixed_dot(x, w, acc, PRECISION)
    # 4. one rounding, at the store
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym + offs_n[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_n[None, :],
    )
