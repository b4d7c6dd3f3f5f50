"""The rank-r passes over rows sorted by adapter: x ``[M, K]`` is read through ``order``, never gathered.

A table of tiles contains ``(adapter, first, count)``: ``count`` rows from position ``first`` of ``order``, all of one adapter. A
tile with adapter -1 is unused. Factors are stacked, ``[E, ...]`` by strides, and cast in registers, so that only those of
adapters with rows are read; s has the wider dtype of factors and x. STEP divides R and the row stride of s; STEP_A and STEP_B
divide a stride of a factor. Offsets of rows and adapters are int64, all others int32.
"""

import triton
import triton.language as tl

from peftkit_kernels.core.tiles import assume_multiple_of, mixed_dot


@triton.jit
def _tile(tiles_ptr, i):
    """``(adapter, first, count)`` of a tile."""
    return (
        tl.load(tiles_ptr + 3 * i),
        tl.load(tiles_ptr + 3 * i + 1),
        tl.load(tiles_ptr + 3 * i + 2),
    )


@triton.jit
def grouped_shrink_kernel(
    x_ptr, a_ptr, scale_ptr,  # x[M, K]  a[E, R, K] by strides  scale[E] or None
    order_ptr, tiles_ptr, s_ptr,  # order[M]  tiles[T, 3]  s[splits * M, R]
    M, K, R, steps,  # steps: blocks of K in each program
    stride_xm, stride_ae, stride_ar, stride_ak, stride_sm,
    HAS_SCALE: tl.constexpr, STEP: tl.constexpr, STEP_A: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``s[m] = scale[e] · a[e] x[m]`` for every row with an adapter. Program (i, j) owns tile i and the j-th share of K."""
    # 1. which rows and which share of K this program owns
    R, stride_sm, stride_ak = (
        assume_multiple_of(R, STEP),
        assume_multiple_of(stride_sm, STEP),
        assume_multiple_of(stride_ak, STEP_A),
    )
    pid_k = tl.program_id(1)
    adapter, first, count = _tile(tiles_ptr, tl.program_id(0))
    if adapter < 0:
        return
    offs_m, offs_r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < count, offs_r < R
    rows = tl.load(order_ptr + first + offs_m, mask=mask_m, other=0)
    x_rows = x_ptr + rows[:, None] * stride_xm
    a_ptr += adapter * stride_ae
    # 2. product with the adapter's factor, over this share of K
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    start = pid_k * steps * BLOCK_K
    for k in range(start, tl.minimum(K, start + steps * BLOCK_K), BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(x_rows + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        a = tl.load(
            a_ptr + offs_r[None, :] * stride_ar + offs_k[:, None] * stride_ak,
            mask=mask_r[None, :] & mask_k[:, None],
            other=0.0,
        )
        if a.dtype != x.dtype:
            a = a.to(tl.float32)
        acc = mixed_dot(x, a, acc, PRECISION)
    # 3. s, or this share's partial sum of it
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + adapter).to(tl.float32)
    offs_s = (pid_k.to(tl.int64) * M + rows)[:, None] * stride_sm + offs_r[None, :]
    s = acc.to(s_ptr.dtype.element_ty)
    tl.store(s_ptr + offs_s, s, mask=mask_m[:, None] & mask_r[None, :])


@triton.jit
def grouped_expand_kernel(
    s_ptr, b_ptr, scale_ptr, y_ptr,  # s[M, R]  b[E, N, R] by strides  scale[E] or None  y[M, N] or None
    order_ptr, tiles_ptr, adapted_ptr, out_ptr,  # adapted[]: rows with an adapter  out[M, N]
    M, N, R, tiles,
    stride_sm, stride_be, stride_bn, stride_br, stride_ym, stride_om,
    HAS_SCALE: tl.constexpr, HAS_Y: tl.constexpr, STEP: tl.constexpr, STEP_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``out[m] = y[m] + scale[e] · b[e] s[m]``. In rows without an adapter ``out`` is y, or 0 if there is no y.

    Program (i, j) owns tile i and column block j. Tiles past the end of the table contain the rows without an adapter, which are
    last in ``order``.
    """
    # 1. which rows and columns this program owns
    R, stride_sm, stride_bn = (
        assume_multiple_of(R, STEP),
        assume_multiple_of(stride_sm, STEP),
        assume_multiple_of(stride_bn, STEP_B),
    )
    pid_m = tl.program_id(0)
    adapter, first, count = _tile(tiles_ptr, tl.minimum(pid_m, tiles - 1))
    position = tl.load(adapted_ptr) + (pid_m - tiles) * BLOCK_M
    listed = pid_m < tiles
    adapter = tl.where(listed, adapter, -1)
    first = tl.where(listed, first, position)
    count = tl.where(listed, count, tl.minimum(M - position, BLOCK_M))
    if count <= 0:
        return
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_n = offs_m < count, offs_n < N
    mask_r = offs_r < tl.where(listed, R, 0)
    rows = tl.load(order_ptr + first + offs_m, mask=mask_m, other=0)
    # 2. the update; rows without an adapter load nothing of adapter 0, because mask_r is false
    own = tl.maximum(adapter, 0)
    s = tl.load(
        s_ptr + rows[:, None] * stride_sm + offs_r[None, :],
        mask=mask_m[:, None] & mask_r[None, :],
        other=0.0,
    )
    b = tl.load(
        b_ptr + own * stride_be + offs_n[None, :] * stride_bn + offs_r[:, None] * stride_br,
        mask=mask_n[None, :] & mask_r[:, None],
        other=0.0,
    )
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = mixed_dot(s, b.to(s.dtype), acc, PRECISION)
    if HAS_SCALE:
        # the scale of adapter 0, which may be NaN, must not change rows without an adapter
        acc = tl.where(listed, acc * tl.load(scale_ptr + own).to(tl.float32), 0.0)
    # 3. add y and store, rounded once
    mask = mask_m[:, None] & mask_n[None, :]
    if HAS_Y:
        y_ptrs = y_ptr + rows[:, None] * stride_ym + offs_n[None, :]
        acc += tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + rows[:, None] * stride_om + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def grouped_tall_kernel(
    x_ptr, s_ptr, scale_ptr,  # x[M, C]  s[M, R]  scale[E] or None
    order_ptr, segments_ptr, g_ptr,  # segments[S, 3]  g[S, R, C]
    C, R,
    stride_xm, stride_sm, stride_gi,
    HAS_SCALE: tl.constexpr, STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``g[i] = scale[e] · Σ s[m]ᵀ x[m]`` over the rows of segment i. Program (i, j) owns segment i and column block j."""
    # 1. which segment and which columns this program owns
    R, stride_sm = assume_multiple_of(R, STEP), assume_multiple_of(stride_sm, STEP)
    pid_s = tl.program_id(0)
    adapter, first, count = _tile(segments_ptr, pid_s)
    if adapter < 0:
        return
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R)
    mask_c, mask_r = offs_c < C, offs_r < R
    # 2. sum over the rows of the segment
    g = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for m in range(0, count.to(tl.int32), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < count
        rows = tl.load(order_ptr + first + offs_m, mask=mask_m, other=0)
        x = tl.load(
            x_ptr + rows[:, None] * stride_xm + offs_c[None, :],
            mask=mask_m[:, None] & mask_c[None, :],
            other=0.0,
        )
        s = tl.load(
            s_ptr + rows[:, None] * stride_sm + offs_r[None, :],
            mask=mask_m[:, None] & mask_r[None, :],
            other=0.0,
        )
        g = mixed_dot(tl.trans(s), x, g, PRECISION)
    # 3. the partial sum of this segment
    if HAS_SCALE:
        g *= tl.load(scale_ptr + adapter).to(tl.float32)
    offs_g = pid_s.to(tl.int64) * stride_gi + offs_r[:, None] * C + offs_c[None, :]
    tl.store(g_ptr + offs_g, g, mask=mask_r[:, None] & mask_c[None, :])


@triton.jit
def grouped_sum_kernel(
    g_ptr, first_ptr, out_ptr,  # g[S, R, C]  first[E + 1]  out[E, R, C] by strides
    R, C,
    stride_gi, stride_oe, stride_or, stride_oc,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums of each adapter's segments in order and rounds once; 0 for an adapter without segments."""
    adapter = tl.program_id(0).to(tl.int64)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (offs_r < R)[:, None] & (offs_c < C)[None, :]
    first, last = tl.load(first_ptr + adapter), tl.load(first_ptr + adapter + 1)
    g_ptrs = g_ptr + first * stride_gi + offs_r[:, None] * C + offs_c[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for _ in range(0, (last - first).to(tl.int32)):
        acc += tl.load(g_ptrs, mask=mask, other=0.0)
        g_ptrs += stride_gi
    offs_out = adapter * stride_oe + offs_r[:, None] * stride_or + offs_c[None, :] * stride_oc
    tl.store(out_ptr + offs_out, acc.to(out_ptr.dtype.element_ty), mask=mask)
