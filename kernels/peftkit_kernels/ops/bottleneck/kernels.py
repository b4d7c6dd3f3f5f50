"""A bottleneck adapter, forward and backward: a program projects its rows down, then projects the result up and adds the rows.

The rows are read twice, the second time from L2, so DRAM gets one read and one write of them. Masks pad the bottleneck R to
BLOCK_R. Offsets of rows are int64.
"""

import triton
import triton.language as tl

from peftkit_kernels.core.tiles import activation


@triton.jit
def _narrow(
    x_rows, w_ptr, mask_m, D, R, stride_wd, stride_wr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The projection down: ``x w`` in float32, ``[BLOCK_M, BLOCK_R]``, for ``w[D, R]`` by strides."""
    offs_r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        x = tl.load(x_rows + offs_d[None, :], mask=mask_m[:, None] & mask_d[None, :], other=0.0)
        w = tl.load(
            w_ptr + offs_d[:, None] * stride_wd + offs_r[None, :] * stride_wr,
            mask=mask_d[:, None] & (offs_r < R)[None, :],
            other=0.0,
        )
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _widen(
    x_rows, a, w_ptr, bias_ptr, y_rows, scale, mask_m, D, R, stride_wr, stride_wd,
    ADD: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The projection up: ``y = x + scale · (a w + bias)`` for ``w[R, D]`` by strides; without ADD, x is not added."""
    offs_r = tl.arange(0, BLOCK_R)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        mask = mask_m[:, None] & mask_d[None, :]
        w = tl.load(
            w_ptr + offs_r[:, None] * stride_wr + offs_d[None, :] * stride_wd,
            mask=(offs_r < R)[:, None] & mask_d[None, :],
            other=0.0,
        )
        y = tl.dot(a, w, input_precision=PRECISION)
        if HAS_BIAS:
            y += tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
        y *= scale
        if ADD:
            y += tl.load(x_rows + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(y_rows + offs_d[None, :], y.to(y_rows.dtype.element_ty), mask=mask)


@triton.jit
def bottleneck_forward_kernel(
    h_ptr, down_ptr, down_bias_ptr, up_ptr, up_bias_ptr,  # h[M, D]  down[R, D], up[D, R] by strides  biases or None
    base_ptr, y_ptr, z_ptr,  # base[M, D], or None if the base is h  y[M, D]  z[M, R]
    scale,
    M, D, R,
    stride_hm, stride_dr, stride_dd, stride_ud, stride_ur, stride_bm, stride_ym,
    HAS_BASE: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``z = h downᵀ + down_bias`` and ``y = base + scale · (act(z) upᵀ + up_bias)``.

    The activation is computed from the rounded z, because the backward has only the rounded z.
    """
    # 1. which rows this program owns
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    rows = offs_m.to(tl.int64)[:, None]
    h_rows = h_ptr + rows * stride_hm
    # 2. z = h downᵀ + down_bias, rounded and stored for the backward
    z = _narrow(
        h_rows, down_ptr, mask_m, D, R, stride_dd, stride_dr, BLOCK_M, BLOCK_D, BLOCK_R, PRECISION
    )
    if HAS_DOWN_BIAS:
        z += tl.load(down_bias_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
    z = z.to(z_ptr.dtype.element_ty)
    tl.store(z_ptr + rows * R + offs_r[None, :], z, mask=mask_m[:, None] & mask_r[None, :])
    # 3. y = base + scale · (act(z) upᵀ + up_bias)
    a, _ = activation(z.to(tl.float32), ACT)
    base_rows = h_rows
    if HAS_BASE:
        base_rows = base_ptr + rows * stride_bm
    _widen(
        base_rows, a.to(h_ptr.dtype.element_ty), up_ptr, up_bias_ptr, y_ptr + rows * stride_ym, scale,
        mask_m, D, R, stride_ur, stride_ud, True, HAS_UP_BIAS, BLOCK_D, BLOCK_R, PRECISION,
    )  # fmt: skip


@triton.jit
def bottleneck_backward_kernel(
    dy_ptr, z_ptr, down_ptr, up_ptr,  # dy[M, D]  z[M, R]  down[R, D], up[D, R] by strides
    a_ptr, dz_ptr, dh_ptr,  # a, dz[M, R]  dh[M, D], each None if it is not needed
    scale,
    M, D, R,
    stride_dym, stride_dr, stride_dd, stride_ud, stride_ur, stride_dhm,
    HAS_BASE: tl.constexpr, WITH_A: tl.constexpr, WITH_DZ: tl.constexpr, WITH_DH: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``a = act(z)``, ``dz = act'(z) ∘ (scale · dy up)`` and ``dh = dz down``, plus dy if there is no separate base."""
    # 1. which rows this program owns
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    rows = offs_m.to(tl.int64)[:, None]
    dy_rows = dy_ptr + rows * stride_dym
    # 2. the gradient at the activation's output
    da = scale * _narrow(
        dy_rows, up_ptr, mask_m, D, R, stride_ud, stride_ur, BLOCK_M, BLOCK_D, BLOCK_R, PRECISION
    )
    # 3. a, for the gradient of up, and dz from the activation's slope
    offs_z = rows * R + offs_r[None, :]
    mask_z = mask_m[:, None] & (offs_r < R)[None, :]
    z = tl.load(z_ptr + offs_z, mask=mask_z, other=0.0).to(tl.float32)
    a, slope = activation(z, ACT)
    dz = (da * slope).to(dy_ptr.dtype.element_ty)
    if WITH_A:
        tl.store(a_ptr + offs_z, a.to(a_ptr.dtype.element_ty), mask=mask_z)
    if WITH_DZ:
        tl.store(dz_ptr + offs_z, dz, mask=mask_z)
    # 4. the gradient of h
    if WITH_DH:
        _widen(
            dy_rows, dz, down_ptr, None, dh_ptr + rows * stride_dhm, 1.0,
            mask_m, D, R, stride_dr, stride_dd, not HAS_BASE, False, BLOCK_D, BLOCK_R, PRECISION,
        )  # fmt: skip
