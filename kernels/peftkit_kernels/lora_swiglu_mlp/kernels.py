"""The gate of an MLP, ``h = act(e) ∘ g``, with the updates of all three linears formed on the fly, forward and backward.

``e`` and ``g`` come from the library's GEMMs without the updates of the gate and up projections; adding ``scale · s bᵀ`` here
costs no pass over them. Ranks are padded to BLOCK_R by masks; STEP divides them and what lies between their rows. Offsets of rows are int64.
"""

import triton
import triton.language as tl

from peftkit_kernels.tiles import activation, kept, mixed_dot, whole


@triton.jit
def _load_s(s_ptr, stride_sm, offs_m, mask_m, R, STEP: tl.constexpr, BLOCK_R: tl.constexpr):
    """``s[M, R]``: rows of it."""
    offs_r = tl.arange(0, BLOCK_R)
    mask = mask_m[:, None] & (offs_r < whole(R, STEP))[None, :]
    offs = offs_m.to(tl.int64)[:, None] * whole(stride_sm, STEP) + offs_r[None, :]
    return tl.load(s_ptr + offs, mask=mask, other=0.0)


@triton.jit
def _load_bt(b_ptr, offs_f, mask_f, R, STEP: tl.constexpr, BLOCK_R: tl.constexpr):
    """``b[F, R]``: rows of it, as columns."""
    R = whole(R, STEP)
    offs_r = tl.arange(0, BLOCK_R)
    offs = offs_f[None, :] * R + offs_r[:, None]
    return tl.load(b_ptr + offs, mask=mask_f[None, :] & (offs_r < R)[:, None], other=0.0)


@triton.jit(do_not_specialize=["seed", "threshold"])
def gate_forward_kernel(
    e_ptr, g_ptr, h_ptr,  # e, g, h[M, F]
    s_e_ptr, b_e_ptr, s_g_ptr, b_g_ptr,  # s_e[M, R_E]  b_e[F, R_E]  s_g[M, R_G]  b_g[F, R_G], or None
    a_d_ptr, s_d_ptr,  # a_d[R_D, F]  s_d[splits * M, R_D], or None
    scale_e, scale_g, factor, seed, threshold,
    M, F, R_E, R_G, R_D, steps,  # steps: blocks of F a program
    stride_em, stride_gm, stride_hm, stride_s_em, stride_s_gm,
    HAS_E: tl.constexpr, HAS_G: tl.constexpr, HAS_D: tl.constexpr, DROPOUT: tl.constexpr,
    ACT: tl.constexpr, STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``h = act(e + scale_e · s_e b_eᵀ) ∘ (g + scale_g · s_g b_gᵀ)`` and ``s_d = factor · drop(h) a_dᵀ`` in one pass.

    Program (i, j): row block i, the j-th share of F.
    """
    pid_m, pid_f = tl.program_id(0), tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    rows = offs_m.to(tl.int64)[:, None]
    if HAS_E:
        s_e = _load_s(s_e_ptr, stride_s_em, offs_m, mask_m, R_E, STEP, BLOCK_R)
    if HAS_G:
        s_g = _load_s(s_g_ptr, stride_s_gm, offs_m, mask_m, R_G, STEP, BLOCK_R)
    s_d = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    first = pid_f * steps * BLOCK_F
    for f in range(first, tl.minimum(F, first + steps * BLOCK_F), BLOCK_F):
        offs_f = f + tl.arange(0, BLOCK_F)
        mask_f = offs_f < F
        mask = mask_m[:, None] & mask_f[None, :]
        e = tl.load(e_ptr + rows * stride_em + offs_f[None, :], mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + rows * stride_gm + offs_f[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_E:
            b_e = _load_bt(b_e_ptr, offs_f, mask_f, R_E, STEP, BLOCK_R)
            e += scale_e * mixed_dot(s_e, b_e, tl.zeros((BLOCK_M, BLOCK_F), tl.float32), PRECISION)
        if HAS_G:
            b_g = _load_bt(b_g_ptr, offs_f, mask_f, R_G, STEP, BLOCK_R)
            g += scale_g * mixed_dot(s_g, b_g, tl.zeros((BLOCK_M, BLOCK_F), tl.float32), PRECISION)
        a, _ = activation(e, ACT)
        h = (a * g).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + rows * stride_hm + offs_f[None, :], h, mask=mask)
        if HAS_D:
            a_d = tl.load(
                a_d_ptr + offs_r[None, :] * F + offs_f[:, None],
                mask=(offs_r < R_D)[None, :] & mask_f[:, None],
                other=0.0,
            )
            if DROPOUT:
                keep = kept(seed, offs_m, f, tl.cdiv(F, 8), threshold, BLOCK_M, BLOCK_F)
                h = tl.where(keep, h, 0.0).to(h_ptr.dtype.element_ty)
            s_d = mixed_dot(h, a_d, s_d, PRECISION)
    if HAS_D:
        R_D = whole(R_D, STEP)
        offs_s = (pid_f.to(tl.int64) * M + offs_m)[:, None] * R_D + offs_r[None, :]
        s_d = (s_d * factor).to(s_d_ptr.dtype.element_ty)
        tl.store(s_d_ptr + offs_s, s_d, mask=mask_m[:, None] & (offs_r < R_D)[None, :])


@triton.jit(do_not_specialize=["seed", "threshold"])
def gate_backward_kernel(
    e_ptr, g_ptr, dh_ptr, de_ptr, dg_ptr,  # [M, F] each
    s_e_ptr, b_e_ptr, s_g_ptr, b_g_ptr,  # as in the forward
    ds_d_ptr, a_d_ptr, da_d_ptr,  # ds_d[M, R_D]  a_d[R_D, F]  da_d[row chunks, R_D, F] or None
    scale_e, scale_g, factor, seed, threshold,
    M, F, R_E, R_G, R_D, chunk_m,  # chunk_m: rows a program, a multiple of BLOCK_M
    stride_em, stride_gm, stride_dhm, stride_dm, stride_s_em, stride_s_gm, stride_ds_dm,
    stride_ai, stride_ar,
    HAS_E: tl.constexpr, HAS_G: tl.constexpr, HAS_D: tl.constexpr, WITH_DA: tl.constexpr,
    DROPOUT: tl.constexpr, ACT: tl.constexpr, STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``de``, ``dg`` and, from ``h`` made again, ``da_d[i] = factor · ds_dᵀ drop(h)``, with ``dh + drop'(ds_d a_d)`` on the fly.

    Program (i, j): row chunk i, column block j. ``factor`` is that of the elements the dropout before the down projection
    keeps, so it stands in both places. dB and ds of gate and up are a pass of their own over de and dg: folded into this one
    they take 255 registers, and spill.
    """
    pid_m, pid_f = tl.program_id(0), tl.program_id(1)
    offs_f = pid_f * BLOCK_F + tl.arange(0, BLOCK_F)
    offs_r = tl.arange(0, BLOCK_R)
    mask_f = offs_f < F
    if HAS_E:
        b_e = _load_bt(b_e_ptr, offs_f, mask_f, R_E, STEP, BLOCK_R)
    if HAS_G:
        b_g = _load_bt(b_g_ptr, offs_f, mask_f, R_G, STEP, BLOCK_R)
    mask_rf = (offs_r < R_D)[:, None] & mask_f[None, :]
    if HAS_D:
        a_d = tl.load(a_d_ptr + offs_r[:, None] * F + offs_f[None, :], mask=mask_rf, other=0.0)
    da_d = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    first = pid_m * chunk_m
    for m in range(first, tl.minimum(M, first + chunk_m), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_f[None, :]
        rows = offs_m.to(tl.int64)[:, None]
        e = tl.load(e_ptr + rows * stride_em + offs_f[None, :], mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + rows * stride_gm + offs_f[None, :], mask=mask, other=0.0).to(tl.float32)
        dh_ptrs = dh_ptr + rows * stride_dhm + offs_f[None, :]
        dh = tl.load(dh_ptrs, mask=mask, other=0.0).to(tl.float32)
        if HAS_E:
            s_e = _load_s(s_e_ptr, stride_s_em, offs_m, mask_m, R_E, STEP, BLOCK_R)
            e += scale_e * mixed_dot(s_e, b_e, tl.zeros((BLOCK_M, BLOCK_F), tl.float32), PRECISION)
        if HAS_G:
            s_g = _load_s(s_g_ptr, stride_s_gm, offs_m, mask_m, R_G, STEP, BLOCK_R)
            g += scale_g * mixed_dot(s_g, b_g, tl.zeros((BLOCK_M, BLOCK_F), tl.float32), PRECISION)
        if HAS_D:
            ds_d = _load_s(ds_d_ptr, stride_ds_dm, offs_m, mask_m, R_D, STEP, BLOCK_R)
            update = mixed_dot(ds_d, a_d, tl.zeros((BLOCK_M, BLOCK_F), tl.float32), PRECISION)
            if DROPOUT:
                keep = kept(
                    seed, offs_m, pid_f * BLOCK_F, tl.cdiv(F, 8), threshold, BLOCK_M, BLOCK_F
                )
                update = tl.where(keep, update * factor, 0.0)
            dh += update
        a, slope = activation(e, ACT)
        if WITH_DA:
            h = a * g
            if DROPOUT:
                h = tl.where(keep, h, 0.0)
            h = h.to(de_ptr.dtype.element_ty)
            da_d = mixed_dot(tl.trans(ds_d), h, da_d, PRECISION)
        offs_d = rows * stride_dm + offs_f[None, :]
        tl.store(dg_ptr + offs_d, (dh * a).to(dg_ptr.dtype.element_ty), mask=mask)
        tl.store(de_ptr + offs_d, (dh * g * slope).to(de_ptr.dtype.element_ty), mask=mask)
    if WITH_DA:
        offs_a = pid_m.to(tl.int64) * stride_ai + offs_r[:, None] * stride_ar + offs_f[None, :]
        tl.store(da_d_ptr + offs_a, (da_d * factor).to(da_d_ptr.dtype.element_ty), mask=mask_rf)
