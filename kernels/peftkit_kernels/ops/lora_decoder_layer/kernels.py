"""The rotation of queries and keys, with or without a norm of each head before it, as a Triton kernel.

Offsets of rows are int64; offsets within a row are int32.
"""

import triton
import triton.language as tl

from peftkit_kernels.ops.frozen_norm.kernels import scale_of


@triton.jit
def rotate_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr,  # q[M, Hq D], k[M, Hk D]  cos, sin[B or 1, S, D] by strides
    raw_q_ptr, raw_k_ptr, w_q_ptr, w_k_ptr,  # with NORM: as q and k  [D] each
    eps, offset,
    M, S, q_heads, D,
    stride_qm, stride_km, stride_rqm, stride_rkm, stride_cb, stride_cs, stride_sb, stride_ss,
    NORM: tl.constexpr, HAS_OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """``t = t ∘ cos + rotate_half(t) ∘ sin`` for each head of q and k, in place; with INVERSE the transposed map, for gradients.

    With NORM, ``t = rms_norm(raw)`` of each head is rotated and written to q and k, and INVERSE returns the gradient of raw.
    Program (i, j) owns row block i of head j; the heads of k follow those of q. BLOCK_H is half a head, padded.
    """
    # 1. which rows of which head
    head = tl.program_id(1)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_H)
    half = D // 2
    mask = (offs_m < M)[:, None] & (offs_d < half)[None, :]
    rows = offs_m.to(tl.int64)
    if head < q_heads:
        _rotate(
            q_ptr + rows[:, None] * stride_qm + head * D + offs_d[None, :],
            raw_q_ptr, stride_rqm, head * D, w_q_ptr, eps, offset,
            cos_ptr, sin_ptr, rows, offs_d, mask, S, half,
            stride_cb, stride_cs, stride_sb, stride_ss,
            NORM, HAS_OFFSET, ROUND_FIRST, INVERSE,
        )  # fmt: skip
    else:
        column = (head - q_heads) * D
        _rotate(
            k_ptr + rows[:, None] * stride_km + column + offs_d[None, :],
            raw_k_ptr, stride_rkm, column, w_k_ptr, eps, offset,
            cos_ptr, sin_ptr, rows, offs_d, mask, S, half,
            stride_cb, stride_cs, stride_sb, stride_ss,
            NORM, HAS_OFFSET, ROUND_FIRST, INVERSE,
        )  # fmt: skip


@triton.jit
def _rotate(
    t_ptrs, raw_ptr, stride_rm, column, w_ptr, eps, offset,
    cos_ptr, sin_ptr, rows, offs_d, mask, S, half,
    stride_cb, stride_cs, stride_sb, stride_ss,
    NORM: tl.constexpr, HAS_OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Rotate one block of rows of one head, rounded once. The two halves of a head are two blocks of columns."""
    dtype: tl.constexpr = t_ptrs.dtype.element_ty
    cos_ptrs = cos_ptr + (rows // S * stride_cb + rows % S * stride_cs)[:, None] + offs_d[None, :]
    sin_ptrs = sin_ptr + (rows // S * stride_sb + rows % S * stride_ss)[:, None] + offs_d[None, :]
    cos_first = tl.load(cos_ptrs, mask=mask, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_ptrs + half, mask=mask, other=0.0).to(tl.float32)
    sin_first = tl.load(sin_ptrs, mask=mask, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_ptrs + half, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        raw_ptrs = raw_ptr + rows[:, None] * stride_rm + column + offs_d[None, :]
        n_first = tl.load(raw_ptrs, mask=mask, other=0.0).to(tl.float32)
        n_second = tl.load(raw_ptrs + half, mask=mask, other=0.0).to(tl.float32)
        squares = tl.sum(n_first * n_first, 1) + tl.sum(n_second * n_second, 1)
        rstd = tl.rsqrt(squares / (2 * half) + eps)[:, None]
        n_first *= rstd
        n_second *= rstd
        w_first = scale_of(w_ptr, offs_d, offs_d < half, offset, HAS_OFFSET, ROUND_FIRST)
        w_second = scale_of(w_ptr + half, offs_d, offs_d < half, offset, HAS_OFFSET, ROUND_FIRST)
    if NORM and not INVERSE:
        first, second = n_first, n_second
        if ROUND_FIRST:
            first = first.to(dtype).to(tl.float32)
            second = second.to(dtype).to(tl.float32)
        first *= w_first
        second *= w_second
    else:
        first = tl.load(t_ptrs, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(t_ptrs + half, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        new_first = first * cos_first + second * sin_second
        new_second = second * cos_second - first * sin_first
    else:
        new_first = first * cos_first - second * sin_first
        new_second = second * cos_second + first * sin_second
    if NORM and INVERSE:
        # the gradient of the norm: rstd (u - n mean(u ∘ n)) with u = gradient ∘ weight
        new_first *= w_first
        new_second *= w_second
        dots = tl.sum(new_first * n_first, 1) + tl.sum(new_second * n_second, 1)
        mean = (dots / (2 * half))[:, None]
        new_first = rstd * (new_first - n_first * mean)
        new_second = rstd * (new_second - n_second * mean)
    tl.store(t_ptrs, new_first.to(dtype), mask=mask)
    tl.store(t_ptrs + half, new_second.to(dtype), mask=mask)
