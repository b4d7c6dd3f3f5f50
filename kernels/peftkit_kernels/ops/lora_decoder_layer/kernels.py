"""The rotation of queries and keys as a Triton kernel.

Offsets of rows are int64; offsets within a row are int32.
"""

import triton
import triton.language as tl


@triton.jit
def rotate_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr,  # q[M, Hq D], k[M, Hk D] in place  cos, sin[B or 1, S, D] by strides
    M, S, q_heads, D,
    stride_qm, stride_km, stride_cb, stride_cs, stride_sb, stride_ss,
    INVERSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """``t = t ∘ cos + rotate_half(t) ∘ sin`` for each head of q and k; with INVERSE the transposed map, for gradients.

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
            cos_ptr, sin_ptr, rows, offs_d, mask, S, half,
            stride_cb, stride_cs, stride_sb, stride_ss, INVERSE,
        )  # fmt: skip
    else:
        _rotate(
            k_ptr + rows[:, None] * stride_km + (head - q_heads) * D + offs_d[None, :],
            cos_ptr, sin_ptr, rows, offs_d, mask, S, half,
            stride_cb, stride_cs, stride_sb, stride_ss, INVERSE,
        )  # fmt: skip


@triton.jit
def _rotate(
    t_ptrs, cos_ptr, sin_ptr, rows, offs_d, mask, S, half,
    stride_cb, stride_cs, stride_sb, stride_ss,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """Rotate one block of rows of one head, in place, rounded once."""
    cos_ptrs = cos_ptr + (rows // S * stride_cb + rows % S * stride_cs)[:, None] + offs_d[None, :]
    sin_ptrs = sin_ptr + (rows // S * stride_sb + rows % S * stride_ss)[:, None] + offs_d[None, :]
    first = tl.load(t_ptrs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(t_ptrs + half, mask=mask, other=0.0).to(tl.float32)
    cos_first = tl.load(cos_ptrs, mask=mask, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_ptrs + half, mask=mask, other=0.0).to(tl.float32)
    sin_first = tl.load(sin_ptrs, mask=mask, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_ptrs + half, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        new_first = first * cos_first + second * sin_second
        new_second = second * cos_second - first * sin_first
    else:
        new_first = first * cos_first - second * sin_first
        new_second = second * cos_second + first * sin_second
    tl.store(t_ptrs, new_first.to(t_ptrs.dtype.element_ty), mask=mask)
    tl.store(t_ptrs + half, new_second.to(t_ptrs.dtype.element_ty), mask=mask)
