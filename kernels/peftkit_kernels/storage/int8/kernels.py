"""8-bit storage by rows as Triton kernels. Offsets of rows and columns are int64."""

import triton
import triton.language as tl


@triton.jit
def dequantize_kernel(
    codes_ptr, row_absmax_ptr, row_scale_ptr, out_ptr,  # codes[N, K]  [N]  [N] or None  out[N, K]
    N, K,
    stride_cn, stride_ck, stride_on, stride_ok,
    HAS_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out = codes · (row_absmax / 127 (· row_scale))``, each factor rounded to float32; each program computes one tile."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_k < K)[None, :]
    rows = offs_n.to(tl.int64)[:, None]
    columns = offs_k.to(tl.int64)[None, :]
    codes = tl.load(codes_ptr + rows * stride_cn + columns * stride_ck, mask=mask, other=0)
    scale = tl.math.div_rn(tl.load(row_absmax_ptr + offs_n, mask=mask_n, other=0.0), 127.0)
    if HAS_SCALE:
        scale *= tl.load(row_scale_ptr + offs_n, mask=mask_n, other=0.0)
    values = (codes.to(tl.float32) * scale[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows * stride_on + columns * stride_ok, values, mask=mask)
