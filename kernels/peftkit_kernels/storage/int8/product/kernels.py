"""A linear in 8 bits: one kernel quantises x ``[M, K]`` by rows and computes its low-rank product, the other multiplies codes.

Offsets of rows are int64; columns, factors and the counters of the dropout rule are int32.
"""

import triton
import triton.language as tl

from peftkit_kernels.core.tiles import grouped_tile, kept, mixed_dot


@triton.jit
def _wide(x, offs_k, mask_k, scale_ptr, skip_ptr, HAS_SCALE: tl.constexpr, HAS_SKIP: tl.constexpr):
    """The values of a tile that are quantised: in float32, columns scaled if HAS_SCALE, skipped columns set to 0."""
    wide = x.to(tl.float32)
    if HAS_SCALE:
        wide *= tl.load(scale_ptr + offs_k, mask=mask_k, other=0.0)[None, :]
    if HAS_SKIP:
        skip = tl.load(skip_ptr + offs_k, mask=mask_k, other=0)
        wide = tl.where((skip != 0)[None, :], 0.0, wide)
    return wide


@triton.jit(do_not_specialize=["threshold"])
def large_columns_kernel(
    x_ptr, large_ptr,  # x[M, K]  large[chunks, K] as bytes
    threshold,
    M, K, chunk_m, stride_xm,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``large[i] = any(|x| >= threshold)`` of each column over row chunk i. Program (i, j) owns chunk i and column block j."""
    pid_m = tl.program_id(0)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    found = tl.zeros((BLOCK_K,), tl.int32)
    first = pid_m * chunk_m
    for m in range(first, tl.minimum(M, first + chunk_m), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & mask_k[None, :]
        x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_k[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        found = tl.maximum(found, tl.max((mask & (tl.abs(x) >= threshold)).to(tl.int32), 0))
    tl.store(large_ptr + pid_m.to(tl.int64) * K + offs_k, found.to(tl.int8), mask=mask_k)


@triton.jit
def list_columns_kernel(
    large_ptr, skip_ptr, columns_ptr,  # large[chunks, K], skip[K] as bytes  columns[1 + K]: how many, and which
    chunks, K,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Which columns are large in any chunk, as a mask and as a list. One program, so that the list is in order."""
    count = tl.zeros((), tl.int32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        large = tl.zeros((BLOCK_K,), tl.int32)
        for i in range(0, chunks):
            part = tl.load(large_ptr + i * K + offs_k, mask=mask_k, other=0)
            large = tl.maximum(large, part.to(tl.int32))
        tl.store(skip_ptr + offs_k, large.to(tl.int8), mask=mask_k)
        place = count + tl.cumsum(large, 0)
        tl.store(columns_ptr + place, offs_k, mask=mask_k & (large != 0))
        count += tl.sum(large, 0)
    tl.store(columns_ptr, count)


@triton.jit(do_not_specialize=["seed", "threshold"])
def quantize_kernel(
    x_ptr, scale_ptr, skip_ptr, a_ptr,  # x[M, K]  scale[K] or None  skip[K] or None  a[R, K] by strides or None
    codes_ptr, step_ptr, s_ptr,  # codes[M, K]  step[M]  s[M, R] or None
    factor, seed, threshold,
    M, K, R,
    stride_xm, stride_ar, stride_ak, stride_cm, stride_sm,
    HAS_SCALE: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_LORA: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``s = factor · drop(x) aᵀ``, and x (columns scaled or skipped) in 8 bits by rows: codes, and the value of one step of a code.

    DRAM is read once: the second read of the rows is from L2. Needs ``fp_fusion=False``.
    """
    # 1. which rows this program owns
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    # 2. largest magnitude of each row, and the low-rank product
    top = tl.zeros((BLOCK_M,), tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(x_rows + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        wide = _wide(x, offs_k, mask_k, scale_ptr, skip_ptr, HAS_SCALE, HAS_SKIP)
        # the bit patterns of magnitudes, read as integers, have the same order, with NaN above every number
        bits = wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        top = tl.maximum(top, tl.max(bits, 1))
        if HAS_LORA:
            a = tl.load(
                a_ptr + offs_r[None, :] * stride_ar + offs_k[:, None] * stride_ak,
                mask=mask_r[None, :] & mask_k[:, None],
                other=0.0,
            )
            if DROPOUT:
                keep = kept(seed, offs_m, k, tl.cdiv(K, 8), threshold, BLOCK_M, BLOCK_K)
                x = tl.where(keep, x, 0.0).to(x_ptr.dtype.element_ty)
            acc = mixed_dot(x, a, acc, PRECISION)
    if HAS_LORA:
        s_ptrs = s_ptr + offs_m.to(tl.int64)[:, None] * stride_sm + offs_r[None, :]
        s = (acc * factor).to(s_ptr.dtype.element_ty)
        tl.store(s_ptrs, s, mask=mask_m[:, None] & mask_r[None, :])
    # 3. the step of each row
    absmax = top.to(tl.float32, bitcast=True)
    tl.store(step_ptr + offs_m, tl.math.div_rn(absmax, 127.0), mask=mask_m)
    # 1 / 0 would turn a row of zeros into NaN
    inverse = tl.math.div_rn(1.0, tl.where(top == 0, 1.0, absmax))
    per_step = tl.where(top == 0, 0.0, inverse * 127.0)
    # 4. codes, from a second read of the rows
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        mask = mask_m[:, None] & mask_k[None, :]
        x = tl.load(x_rows + offs_k[None, :], mask=mask, other=0.0)
        wide = _wide(x, offs_k, mask_k, scale_ptr, skip_ptr, HAS_SCALE, HAS_SKIP)
        scaled = tl.minimum(tl.maximum(wide * per_step[:, None], -127.0), 127.0)
        # adding 1.5 · 2²³ to a number below 2²² puts that number, rounded to nearest even, into the low bits of the sum
        codes = (scaled + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
        codes_rows = codes_ptr + offs_m.to(tl.int64)[:, None] * stride_cm
        tl.store(codes_rows + offs_k[None, :], codes, mask=mask)


@triton.jit(do_not_specialize=["seed", "threshold"])
def int8_gemm_kernel(
    x_ptr, w_ptr, row_step_ptr, column_step_ptr,  # x[M, K]  w[N, K] by strides  [M]  [N] or None
    s_ptr, b_ptr, bias_ptr, y_ptr,  # s[M, R], b[N, R] by strides or None  bias[N] or None  y[M, N]
    full_ptr, columns_ptr,  # full[M, K] and the list of its columns that x lacks, or None
    factor, seed, threshold,
    M, N, K, R,
    stride_xm, stride_wn, stride_wk, stride_sm, stride_bn, stride_br, stride_ym, stride_fm,
    HAS_STEP: tl.constexpr, HAS_LORA: tl.constexpr, HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, HAS_OUTLIERS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``y = (x wᵀ) · row_step · column_step + mask ∘ (factor · s bᵀ) + bias``: exact integer sums, one rounding at the store.

    With HAS_OUTLIERS the listed columns of ``full`` are multiplied with those of w in the dtype of ``full`` and added.
    In the backward x holds the codes of ``dy ∘ sw``, w = W₈ᵀ, s = ds, b = Aᵀ, and the mask is that of a dropout over y's columns.
    """
    # 1. which tile this program owns
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    # 2. integer product
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(
            x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_k[None, :],
            mask=mask_m[:, None] & mask_k[None, :],
            other=0,
        )
        offs_w = offs_n.to(tl.int64)[None, :] * stride_wn + offs_k.to(tl.int64)[:, None] * stride_wk
        w = tl.load(w_ptr + offs_w, mask=mask_n[None, :] & mask_k[:, None], other=0)
        total = tl.dot(x, w, total, out_dtype=tl.int32)
    # 3. outlier columns, scales and update
    acc = total.to(tl.float32) * tl.load(row_step_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
    if HAS_OUTLIERS:
        count = tl.load(columns_ptr)
        for j in range(0, count, 16):
            offs_j = j + tl.arange(0, 16)
            mask_j = offs_j < count
            listed = tl.load(columns_ptr + 1 + offs_j, mask=mask_j, other=0)
            full = tl.load(
                full_ptr + offs_m.to(tl.int64)[:, None] * stride_fm + listed[None, :],
                mask=mask_m[:, None] & mask_j[None, :],
                other=0.0,
            )
            offs_w = offs_n.to(tl.int64)[None, :] * stride_wn
            offs_w += listed.to(tl.int64)[:, None] * stride_wk
            w = tl.load(w_ptr + offs_w, mask=mask_n[None, :] & mask_j[:, None], other=0)
            acc = tl.dot(full, w.to(full_ptr.dtype.element_ty), acc, input_precision="ieee")
    if HAS_STEP:
        acc *= tl.load(column_step_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
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
        update = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        update = mixed_dot(s, b, update, PRECISION) * factor
        if DROPOUT:
            column = tile_n * BLOCK_N
            keep = kept(seed, offs_m, column, tl.cdiv(N, 8), threshold, BLOCK_M, BLOCK_N)
            update = tl.where(keep, update, 0.0)
        acc += update
    # 4. one rounding, at the store
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym + offs_n[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_n[None, :],
    )
