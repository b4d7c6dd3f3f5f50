"""The gate of a gated MLP, ``h = act(gate) ∘ up``, with the low-rank updates of all three linears, forward and backward.

``gate`` and ``up`` come from the library's GEMMs without their low-rank updates. The kernels add ``scale · s bᵀ`` while they
read them, so the updates need no pass of their own. Ranks are padded to BLOCK_R and masked. STEP divides the ranks and the
distances between rows. Row offsets are int64.
"""

import triton
import triton.language as tl

from peftkit_kernels.core.tiles import activation, assume_multiple_of, kept, mixed_dot


@triton.jit
def _load_s(s_ptr, stride_sm, offs_m, mask_m, R, STEP: tl.constexpr, BLOCK_R: tl.constexpr):
    """A tile of rows of ``s[M, R]``."""
    offs_r = tl.arange(0, BLOCK_R)
    mask = mask_m[:, None] & (offs_r < assume_multiple_of(R, STEP))[None, :]
    offs = offs_m.to(tl.int64)[:, None] * assume_multiple_of(stride_sm, STEP) + offs_r[None, :]
    return tl.load(s_ptr + offs, mask=mask, other=0.0)


@triton.jit
def _load_bt(b_ptr, offs_f, mask_f, R, STEP: tl.constexpr, BLOCK_R: tl.constexpr):
    """A tile of rows of ``b[F, R]``, transposed."""
    R = assume_multiple_of(R, STEP)
    offs_r = tl.arange(0, BLOCK_R)
    offs = offs_f[None, :] * R + offs_r[:, None]
    return tl.load(b_ptr + offs, mask=mask_f[None, :] & (offs_r < R)[:, None], other=0.0)


@triton.jit(do_not_specialize=["seed", "threshold"])
def gate_forward_kernel(
    gate_ptr, up_ptr, h_ptr,  # [M, F] each
    s_gate_ptr, b_gate_ptr, s_up_ptr, b_up_ptr,  # s[M, R] and b[F, R] of each, or None
    a_down_ptr, s_down_ptr,  # a_down[R_DOWN, F]  s_down[splits * M, R_DOWN], or None
    scale_gate, scale_up, factor, seed, threshold,
    M, F, R_GATE, R_UP, R_DOWN, steps,  # steps: blocks of F in each program
    stride_gate_m, stride_up_m, stride_hm, stride_s_gate_m, stride_s_up_m,
    HAS_GATE_LORA: tl.constexpr, HAS_UP_LORA: tl.constexpr, HAS_DOWN_LORA: tl.constexpr, DROPOUT: tl.constexpr,
    ACT: tl.constexpr, STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``h = act(gate + scale_gate · s_gate b_gateᵀ) ∘ (up + scale_up · s_up b_upᵀ)``; ``s_down = factor · drop(h) a_downᵀ``.

    Program (i, j) owns row block i and the j-th share of F.
    """
    # 1. which rows and which share of F this program owns, and the s of these rows
    pid_m, pid_f = tl.program_id(0), tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    rows = offs_m.to(tl.int64)[:, None]
    if HAS_GATE_LORA:
        s_gate = _load_s(s_gate_ptr, stride_s_gate_m, offs_m, mask_m, R_GATE, STEP, BLOCK_R)
    if HAS_UP_LORA:
        s_up = _load_s(s_up_ptr, stride_s_up_m, offs_m, mask_m, R_UP, STEP, BLOCK_R)
    # 2. one block of columns at a time: gate and up with their updates, h, and its product with a_down
    s_down = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    first = pid_f * steps * BLOCK_F
    for f in range(first, tl.minimum(F, first + steps * BLOCK_F), BLOCK_F):
        offs_f = f + tl.arange(0, BLOCK_F)
        mask_f = offs_f < F
        mask = mask_m[:, None] & mask_f[None, :]
        gate = tl.load(gate_ptr + rows * stride_gate_m + offs_f[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        up = tl.load(up_ptr + rows * stride_up_m + offs_f[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        if HAS_GATE_LORA:
            b_gate = _load_bt(b_gate_ptr, offs_f, mask_f, R_GATE, STEP, BLOCK_R)
            gate += scale_gate * mixed_dot(
                s_gate, b_gate, tl.zeros((BLOCK_M, BLOCK_F), tl.float32), PRECISION
            )
        if HAS_UP_LORA:
            b_up = _load_bt(b_up_ptr, offs_f, mask_f, R_UP, STEP, BLOCK_R)
            up += scale_up * mixed_dot(
                s_up, b_up, tl.zeros((BLOCK_M, BLOCK_F), tl.float32), PRECISION
            )
        a, _ = activation(gate, ACT)
        h = (a * up).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + rows * stride_hm + offs_f[None, :], h, mask=mask)
        if HAS_DOWN_LORA:
            a_down = tl.load(
                a_down_ptr + offs_r[None, :] * F + offs_f[:, None],
                mask=(offs_r < R_DOWN)[None, :] & mask_f[:, None],
                other=0.0,
            )
            if DROPOUT:
                keep = kept(seed, offs_m, f, tl.cdiv(F, 8), threshold, BLOCK_M, BLOCK_F)
                h = tl.where(keep, h, 0.0).to(h_ptr.dtype.element_ty)
            s_down = mixed_dot(h, a_down, s_down, PRECISION)
    # 3. s_down, or this share's partial sum of it
    if HAS_DOWN_LORA:
        R_DOWN = assume_multiple_of(R_DOWN, STEP)
        offs_s = (pid_f.to(tl.int64) * M + offs_m)[:, None] * R_DOWN + offs_r[None, :]
        s_down = (s_down * factor).to(s_down_ptr.dtype.element_ty)
        tl.store(s_down_ptr + offs_s, s_down, mask=mask_m[:, None] & (offs_r < R_DOWN)[None, :])


@triton.jit(do_not_specialize=["seed", "threshold"])
def gate_backward_kernel(
    gate_ptr, up_ptr, dh_ptr, d_gate_ptr, d_up_ptr,  # [M, F] each
    s_gate_ptr, b_gate_ptr, s_up_ptr, b_up_ptr,  # as in the forward
    ds_down_ptr, a_down_ptr, da_down_ptr,  # ds[M, R_DOWN]  a[R_DOWN, F]  da[row chunks, R_DOWN, F], or None
    scale_gate, scale_up, factor, seed, threshold,
    M, F, R_GATE, R_UP, R_DOWN, chunk_m,  # chunk_m: rows of each program, a multiple of BLOCK_M
    stride_gate_m, stride_up_m, stride_dhm, stride_dm, stride_s_gate_m, stride_s_up_m, stride_ds_down_m,
    stride_ai, stride_ar,
    HAS_GATE_LORA: tl.constexpr, HAS_UP_LORA: tl.constexpr, HAS_DOWN_LORA: tl.constexpr, WITH_DA: tl.constexpr,
    DROPOUT: tl.constexpr, ACT: tl.constexpr, STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``d_gate``, ``d_up`` and ``da_down[i] = factor · ds_downᵀ drop(h)``; ``h`` is recomputed, not read.

    Program (i, j) owns row chunk i and column block j. ``dh`` is completed by ``drop'(ds_down a_down)`` while it is read. ``factor``
    scales the elements that the dropout before the down projection keeps, so it appears twice. dB and ds of gate and up are
    computed by another pass over d_gate and d_up: inside this kernel they would need 255 registers, and spill.
    """
    # 1. which rows and columns this program owns, and the factors of these columns
    pid_m, pid_f = tl.program_id(0), tl.program_id(1)
    offs_f = pid_f * BLOCK_F + tl.arange(0, BLOCK_F)
    offs_r = tl.arange(0, BLOCK_R)
    mask_f = offs_f < F
    if HAS_GATE_LORA:
        b_gate = _load_bt(b_gate_ptr, offs_f, mask_f, R_GATE, STEP, BLOCK_R)
    if HAS_UP_LORA:
        b_up = _load_bt(b_up_ptr, offs_f, mask_f, R_UP, STEP, BLOCK_R)
    mask_rf = (offs_r < R_DOWN)[:, None] & mask_f[None, :]
    if HAS_DOWN_LORA:
        a_down = tl.load(
            a_down_ptr + offs_r[:, None] * F + offs_f[None, :], mask=mask_rf, other=0.0
        )
    # 2. one block of rows at a time
    da_down = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    first = pid_m * chunk_m
    for m in range(first, tl.minimum(M, first + chunk_m), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_f[None, :]
        rows = offs_m.to(tl.int64)[:, None]
        gate = tl.load(gate_ptr + rows * stride_gate_m + offs_f[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        up = tl.load(up_ptr + rows * stride_up_m + offs_f[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        dh_ptrs = dh_ptr + rows * stride_dhm + offs_f[None, :]
        dh = tl.load(dh_ptrs, mask=mask, other=0.0).to(tl.float32)
        # 2a. add the low-rank updates to gate, up and dh
        if HAS_GATE_LORA:
            s_gate = _load_s(s_gate_ptr, stride_s_gate_m, offs_m, mask_m, R_GATE, STEP, BLOCK_R)
            gate += scale_gate * mixed_dot(
                s_gate, b_gate, tl.zeros((BLOCK_M, BLOCK_F), tl.float32), PRECISION
            )
        if HAS_UP_LORA:
            s_up = _load_s(s_up_ptr, stride_s_up_m, offs_m, mask_m, R_UP, STEP, BLOCK_R)
            up += scale_up * mixed_dot(
                s_up, b_up, tl.zeros((BLOCK_M, BLOCK_F), tl.float32), PRECISION
            )
        if HAS_DOWN_LORA:
            ds_down = _load_s(ds_down_ptr, stride_ds_down_m, offs_m, mask_m, R_DOWN, STEP, BLOCK_R)
            update = mixed_dot(ds_down, a_down, tl.zeros((BLOCK_M, BLOCK_F), tl.float32), PRECISION)
            if DROPOUT:
                keep = kept(
                    seed, offs_m, pid_f * BLOCK_F, tl.cdiv(F, 8), threshold, BLOCK_M, BLOCK_F
                )
                update = tl.where(keep, update * factor, 0.0)
            dh += update
        # 2b. h again, and its part of da_down
        a, slope = activation(gate, ACT)
        if WITH_DA:
            h = a * up
            if DROPOUT:
                h = tl.where(keep, h, 0.0)
            h = h.to(d_gate_ptr.dtype.element_ty)
            da_down = mixed_dot(tl.trans(ds_down), h, da_down, PRECISION)
        # 2c. the gradients of gate and up
        offs_d = rows * stride_dm + offs_f[None, :]
        tl.store(d_up_ptr + offs_d, (dh * a).to(d_up_ptr.dtype.element_ty), mask=mask)
        tl.store(d_gate_ptr + offs_d, (dh * up * slope).to(d_gate_ptr.dtype.element_ty), mask=mask)
    # 3. da_down of this chunk of rows
    if WITH_DA:
        offs_a = pid_m.to(tl.int64) * stride_ai + offs_r[:, None] * stride_ar + offs_f[None, :]
        tl.store(
            da_down_ptr + offs_a, (da_down * factor).to(da_down_ptr.dtype.element_ty), mask=mask_rf
        )
