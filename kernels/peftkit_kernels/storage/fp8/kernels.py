"""Float8 storage as Triton kernels. Offsets of rows and columns are int64."""

import triton
import triton.language as tl


@triton.jit
def dequantize_kernel(
    codes_ptr, scale_ptr, row_scale_ptr, out_ptr,  # codes[N, K] as bytes  [N]  [N] or None  out[N, K]
    N, K,
    stride_cn, stride_ck, stride_on, stride_ok,
    HAS_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out = codes · (scale (· row_scale))``, each factor rounded to float32; each program computes one tile.

    The codes are decoded with integers, so that GPUs without float8 run this kernel too.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_k < K)[None, :]
    rows = offs_n.to(tl.int64)[:, None]
    columns = offs_k.to(tl.int64)[None, :]
    codes = tl.load(codes_ptr + rows * stride_cn + columns * stride_ck, mask=mask, other=0)
    # sign, four bits of exponent (bias 7), three of mantissa
    bits = codes.to(tl.int32)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    # without the implicit one the unit of the mantissa is 2⁻⁹
    value = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
    value = tl.where((bits & 127) == 127, float("nan"), value)
    value = tl.where((bits & 128) != 0, -value, value)
    scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)
    if HAS_SCALE:
        scale *= tl.load(row_scale_ptr + offs_n, mask=mask_n, other=0.0)
    values = (value * scale[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows * stride_on + columns * stride_ok, values, mask=mask)
