"""RMSNorm and LayerNorm with a frozen weight, forward and backward: a program holds whole rows, which it reads once.

With CENTRE the norm is LayerNorm, without it RMSNorm. Offsets of rows are int64.
"""

import triton
import triton.language as tl


@triton.jit
def scale_of(w_ptr, offs_k, mask_k, offset, HAS_OFFSET: tl.constexpr, ROUND: tl.constexpr):
    """``offset + w`` in float32. With ROUND the sum is rounded to the dtype of w, as in a module that adds in that dtype."""
    w = tl.load(w_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    if HAS_OFFSET:
        w += offset
        if ROUND:
            w = w.to(w_ptr.dtype.element_ty).to(tl.float32)
    return w[None, :]


@triton.jit
def norm_forward_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr,  # x[M, K]  w[K]  bias[K] or None  y[M, K]
    mean_ptr, rstd_ptr,  # mean[M] or None  rstd[M], both float32
    residual_ptr,  # [M, K] or None
    eps, offset,
    M, K, stride_xm, stride_ym, stride_rm,
    ADD: tl.constexpr, CENTRE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``y = (x - mean) · rstd · (offset + w) + bias``. With ADD, ``x += residual`` first, rounded and stored."""
    # 1. which rows this program owns
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_k = offs_m < M, offs_k < K
    mask = mask_m[:, None] & mask_k[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    # 2. statistics, from the one read of x
    x_ptrs = x_ptr + rows * stride_xm + offs_k[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        residual_ptrs = residual_ptr + rows * stride_rm + offs_k[None, :]
        x += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
        total = x.to(x_ptr.dtype.element_ty)
        tl.store(x_ptrs, total, mask=mask)
        x = total.to(tl.float32)
    if CENTRE:
        mean = tl.sum(x, 1) / K
        x = tl.where(mask, x - mean[:, None], 0.0)
        tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / K + eps)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)
    # 3. y
    y = x * rstd[:, None]
    if ROUND_FIRST:
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
    y *= scale_of(w_ptr, offs_k, mask_k, offset, HAS_OFFSET, ROUND_FIRST)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rows * stride_ym + offs_k[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_backward_kernel(
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr,  # dy, x, dx[M, K]  w[K]  mean[M] or None  rstd[M]
    residual_ptr,  # [M, K] or None
    offset,
    M, K, stride_dym, stride_xm, stride_dxm, stride_rm,
    ADD: tl.constexpr, CENTRE: tl.constexpr, HAS_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """With ``n = (x - mean) · rstd`` and ``u = dy ∘ (offset + w)``: ``dx = rstd (u - mean(u) - n mean(u ∘ n))``.

    RMSNorm does not subtract the means of x and u. With ADD, ``residual`` is added to dx.
    """
    # 1. which rows this program owns
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_k = offs_m < M, offs_k < K
    mask = mask_m[:, None] & mask_k[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    # 2. u and n
    x = tl.load(x_ptr + rows * stride_xm + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
    u = tl.load(dy_ptr + rows * stride_dym + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
    u *= scale_of(w_ptr, offs_k, mask_k, offset, HAS_OFFSET, False)
    rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
    if CENTRE:
        # the padding of x becomes -mean, but u is 0 there and the padding is not stored
        x -= tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
    n = x * rstd
    # 3. dx
    dx = u - n * (tl.sum(u * n, 1) / K)[:, None]
    if CENTRE:
        dx -= (tl.sum(u, 1) / K)[:, None]
    dx *= rstd
    if ADD:
        residual_ptrs = residual_ptr + rows * stride_rm + offs_k[None, :]
        dx += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    dx_ptrs = dx_ptr + rows * stride_dxm + offs_k[None, :]
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
