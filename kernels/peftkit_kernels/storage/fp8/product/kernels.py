"""Float8 rows and transposed codes. Offsets of rows are int64; columns are int32."""

import triton
import triton.language as tl


@triton.jit
def _wide(x, offs_k, mask_k, column_scale_ptr, HAS_SCALE: tl.constexpr):
    """The values of a tile that are quantised: in float32, columns scaled if HAS_SCALE."""
    wide = x.to(tl.float32)
    if HAS_SCALE:
        wide *= tl.load(column_scale_ptr + offs_k, mask=mask_k, other=0.0)[None, :]
    return wide


@triton.jit
def _nearest_code(x):
    """The code nearest to each number, ties to even, as an integer. No magnitude is above 464, half way to what 480 would be.

    By integers, so that GPUs without float8 run this too, and the interpreter, whose own conversion does not round to even.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # normal codes: the sum carries if the 20 bits that are cut off are more than half, or half and the last kept bit is odd
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # below 2⁻⁶: adding 2¹⁴ puts the number, in units of 2⁻⁹ and rounded to even, into the low bits of the sum
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) & 15
    code = tl.where(magnitude < 0x3C800000, small, normal)
    code = tl.where(magnitude > 0x7F800000, 127, code)
    return code | ((bits >> 24) & 128)


@triton.jit
def quantize_kernel(
    x_ptr, column_scale_ptr,  # x[M, K]  [K] or None
    codes_ptr, scale_ptr,  # codes[M, K] as bytes  scale[M]
    M, K,
    stride_xm,
    HAS_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The rows of x (columns scaled) in float8: codes, and the scale of each row. Needs ``fp_fusion=False``.

    DRAM is read once: the second read of the rows is from L2.
    """
    # 1. which rows this program owns
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    # 2. largest magnitude of each row
    top = tl.zeros((BLOCK_M,), tl.int32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(x_rows + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        wide = _wide(x, offs_k, mask_k, column_scale_ptr, HAS_SCALE)
        # the bit patterns of magnitudes, read as integers, have the same order, with NaN above every number
        top = tl.maximum(top, tl.max(wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
    # 3. the scale of each row; the comparison keeps a NaN, which tl.maximum would drop
    scale = tl.math.div_rn(top.to(tl.float32, bitcast=True), 448.0)
    scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
    tl.store(scale_ptr + offs_m, scale, mask=mask_m)
    inverse = tl.math.div_rn(1.0, scale)
    # 4. codes, from a second read of the rows
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        mask = mask_m[:, None] & mask_k[None, :]
        x = tl.load(x_rows + offs_k[None, :], mask=mask, other=0.0)
        wide = _wide(x, offs_k, mask_k, column_scale_ptr, HAS_SCALE)
        codes = _nearest_code(wide * inverse[:, None]).to(tl.uint8)
        codes_rows = codes_ptr + offs_m.to(tl.int64)[:, None] * K
        tl.store(codes_rows + offs_k[None, :], codes, mask=mask)


@triton.jit
def transpose_kernel(
    codes_ptr, out_ptr,  # codes[N, K], out[K, N], both as bytes
    N, K,
    stride_cn,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``out = codesᵀ``; each program moves one tile."""
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_n, mask_k = offs_n < N, offs_k < K
    tile = tl.load(
        codes_ptr + offs_n.to(tl.int64)[:, None] * stride_cn + offs_k[None, :],
        mask=mask_n[:, None] & mask_k[None, :],
        other=0,
    )
    tl.store(
        out_ptr + offs_k.to(tl.int64)[:, None] * N + offs_n[None, :],
        tl.trans(tile),
        mask=mask_k[:, None] & mask_n[None, :],
    )
