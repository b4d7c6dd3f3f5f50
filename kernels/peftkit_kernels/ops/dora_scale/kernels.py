"""DoRA's magnitude applied to a LoRA linear's output, alone and in the gate of an MLP, forward and backward.

Every tensor is read once and written once. A program reads the values of a column (factor, bias) once for all rows of its
chunk. It keeps one running sum for each element of a tile and adds the tile's rows at the end. Programs are numbered along the
columns first, so that those that run together access the same pages of DRAM. Offsets of rows are int64.
"""

import triton
import triton.language as tl

from peftkit_kernels.core.tiles import activation


@triton.jit
def _of_columns(ptr, offs_n, mask_n, PRESENT: tl.constexpr, absent, BLOCK_N: tl.constexpr):
    """``ptr[N]`` in float32, or the value ``absent`` for every column."""
    if PRESENT:
        values = tl.load(ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    else:
        values = tl.full((BLOCK_N,), absent, tl.float32)
    return values[None, :]


@triton.jit
def scale_kernel(
    z_ptr, g_ptr, bias_ptr, y_ptr,  # z, y[M, N]  g[N] or None  bias[N] or None
    M, N, stride_zm, stride_ym,
    HAS_G: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``y = z ∘ g + bias``."""
    blocks = tl.cdiv(N, BLOCK_N)
    offs_m = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    g = _of_columns(g_ptr, offs_n, mask_n, HAS_G, 1.0, BLOCK_N)
    bias = _of_columns(bias_ptr, offs_n, mask_n, HAS_BIAS, 0.0, BLOCK_N)
    z = tl.load(z_ptr + rows * stride_zm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    y = (z * g + bias).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows * stride_ym + offs_n[None, :], y, mask=mask)


@triton.jit
def scale_backward_kernel(
    dy_ptr, z_ptr, g_ptr,  # dy[M, N]  z[M, N] and g[N], each None if it is not needed
    dz_ptr, sums_ptr,  # dz[M, N] or None  sums[row chunks, DG + DBIAS, N] or None
    M, N, chunk_m, stride_dym, stride_zm, stride_dzm,
    DZ: tl.constexpr, DG: tl.constexpr, DBIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``dz = dy ∘ g``; over each chunk of rows ``Σ dy ∘ z`` with DG and ``Σ dy`` with DBIAS, in this order."""
    # 1. which columns and which chunk of rows this program owns
    blocks = tl.cdiv(N, BLOCK_N)
    pid_m = tl.program_id(0) // blocks
    offs_n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    # 2. one pass over the rows: dz, and running sums for each element of the tile
    g = _of_columns(g_ptr, offs_n, mask_n, DZ, 1.0, BLOCK_N)
    dg = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = pid_m * chunk_m
    for m in range(first, tl.minimum(M, first + chunk_m), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & mask_n[None, :]
        rows = offs_m.to(tl.int64)[:, None]
        dy_ptrs = dy_ptr + rows * stride_dym + offs_n[None, :]
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        if DG:
            z_ptrs = z_ptr + rows * stride_zm + offs_n[None, :]
            dg += dy * tl.load(z_ptrs, mask=mask, other=0.0).to(tl.float32)
        if DBIAS:
            dbias += dy
        if DZ:
            dz = (dy * g).to(dz_ptr.dtype.element_ty)
            tl.store(dz_ptr + rows * stride_dzm + offs_n[None, :], dz, mask=mask)
    # 3. the sums over this chunk's rows
    offs_s = pid_m.to(tl.int64) * (DG + DBIAS) * N + offs_n
    if DG:
        tl.store(sums_ptr + offs_s, tl.sum(dg, 0), mask=mask_n)
        offs_s += N
    if DBIAS:
        tl.store(sums_ptr + offs_s, tl.sum(dbias, 0), mask=mask_n)


@triton.jit
def scaled_gate_kernel(
    z_gate_ptr, z_up_ptr, g_gate_ptr, g_up_ptr, bias_gate_ptr, bias_up_ptr,  # z[M, F]  g[F] or None  bias[F] or None
    h_ptr,  # h[M, F]
    M, F, stride_gate_m, stride_up_m, stride_hm,
    HAS_G_GATE: tl.constexpr, HAS_G_UP: tl.constexpr,
    HAS_BIAS_GATE: tl.constexpr, HAS_BIAS_UP: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """``h = act(z_gate ∘ g_gate + bias_gate) ∘ (z_up ∘ g_up + bias_up)``."""
    blocks = tl.cdiv(F, BLOCK_F)
    offs_m = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_f = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_f = offs_f < F
    mask = (offs_m < M)[:, None] & mask_f[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    g_gate = _of_columns(g_gate_ptr, offs_f, mask_f, HAS_G_GATE, 1.0, BLOCK_F)
    g_up = _of_columns(g_up_ptr, offs_f, mask_f, HAS_G_UP, 1.0, BLOCK_F)
    bias_gate = _of_columns(bias_gate_ptr, offs_f, mask_f, HAS_BIAS_GATE, 0.0, BLOCK_F)
    bias_up = _of_columns(bias_up_ptr, offs_f, mask_f, HAS_BIAS_UP, 0.0, BLOCK_F)
    gate = tl.load(z_gate_ptr + rows * stride_gate_m + offs_f[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    up = tl.load(z_up_ptr + rows * stride_up_m + offs_f[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    a, _ = activation(gate * g_gate + bias_gate, ACT)
    h = (a * (up * g_up + bias_up)).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + rows * stride_hm + offs_f[None, :], h, mask=mask)


@triton.jit
def scaled_gate_backward_kernel(
    dh_ptr, z_gate_ptr, z_up_ptr, g_gate_ptr, g_up_ptr, bias_gate_ptr, bias_up_ptr,  # dh[M, F], the rest as in the forward
    dz_gate_ptr, dz_up_ptr, sums_ptr,  # dz[M, F] each  sums[row chunks, sums wanted, F] or None
    M, F, chunk_m, stride_dhm, stride_gate_m, stride_up_m, stride_dzm,
    HAS_G_GATE: tl.constexpr, HAS_G_UP: tl.constexpr,
    HAS_BIAS_GATE: tl.constexpr, HAS_BIAS_UP: tl.constexpr,
    DG_GATE: tl.constexpr, DG_UP: tl.constexpr, DBIAS_GATE: tl.constexpr, DBIAS_UP: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """``d_gate = dh ∘ up ∘ act'(gate)``, ``d_up = dh ∘ act(gate)``, ``dz_gate = d_gate ∘ g_gate`` and ``dz_up = d_up ∘ g_up``.

    ``gate`` and ``up``, the scaled values, are recomputed. The sums over each chunk of rows are ``Σ d_gate ∘ z_gate``,
    ``Σ d_up ∘ z_up``, ``Σ d_gate`` and ``Σ d_up``, in this order, without those that are not needed.
    """
    # 1. which columns and which chunk of rows this program owns
    blocks = tl.cdiv(F, BLOCK_F)
    pid_m = tl.program_id(0) // blocks
    offs_f = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_f = offs_f < F
    g_gate = _of_columns(g_gate_ptr, offs_f, mask_f, HAS_G_GATE, 1.0, BLOCK_F)
    g_up = _of_columns(g_up_ptr, offs_f, mask_f, HAS_G_UP, 1.0, BLOCK_F)
    bias_gate = _of_columns(bias_gate_ptr, offs_f, mask_f, HAS_BIAS_GATE, 0.0, BLOCK_F)
    bias_up = _of_columns(bias_up_ptr, offs_f, mask_f, HAS_BIAS_UP, 0.0, BLOCK_F)
    # 2. one pass over the rows
    dg_gate = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    dg_up = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    dbias_gate = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    dbias_up = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    first = pid_m * chunk_m
    for m in range(first, tl.minimum(M, first + chunk_m), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & mask_f[None, :]
        rows = offs_m.to(tl.int64)[:, None]
        z_gate_ptrs = z_gate_ptr + rows * stride_gate_m + offs_f[None, :]
        z_up_ptrs = z_up_ptr + rows * stride_up_m + offs_f[None, :]
        dh_ptrs = dh_ptr + rows * stride_dhm + offs_f[None, :]
        z_gate = tl.load(z_gate_ptrs, mask=mask, other=0.0).to(tl.float32)
        z_up = tl.load(z_up_ptrs, mask=mask, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptrs, mask=mask, other=0.0).to(tl.float32)
        # gate and up again, then the gradients at both
        a, slope = activation(z_gate * g_gate + bias_gate, ACT)
        d_gate = dh * (z_up * g_up + bias_up) * slope
        d_up = dh * a
        offs_d = rows * stride_dzm + offs_f[None, :]
        tl.store(
            dz_gate_ptr + offs_d, (d_gate * g_gate).to(dz_gate_ptr.dtype.element_ty), mask=mask
        )
        tl.store(dz_up_ptr + offs_d, (d_up * g_up).to(dz_up_ptr.dtype.element_ty), mask=mask)
        # running sums for each element of the tile
        if DG_GATE:
            dg_gate += d_gate * z_gate
        if DG_UP:
            dg_up += d_up * z_up
        if DBIAS_GATE:
            dbias_gate += d_gate
        if DBIAS_UP:
            dbias_up += d_up
    # 3. the sums over this chunk's rows, in the order of the docstring
    offs_s = pid_m.to(tl.int64) * (DG_GATE + DG_UP + DBIAS_GATE + DBIAS_UP) * F + offs_f
    if DG_GATE:
        tl.store(sums_ptr + offs_s, tl.sum(dg_gate, 0), mask=mask_f)
        offs_s += F
    if DG_UP:
        tl.store(sums_ptr + offs_s, tl.sum(dg_up, 0), mask=mask_f)
        offs_s += F
    if DBIAS_GATE:
        tl.store(sums_ptr + offs_s, tl.sum(dbias_gate, 0), mask=mask_f)
        offs_s += F
    if DBIAS_UP:
        tl.store(sums_ptr + offs_s, tl.sum(dbias_up, 0), mask=mask_f)
