"""Loss and gradient of rows of logits; the gradient is written over the logits."""

import triton
import triton.language as tl


@triton.jit
def _tanh(v):
    # not libdevice's tanh, which the interpreter and AMD do not have
    e = tl.exp2(-2.8853900817779268 * tl.abs(v))
    return tl.where(v < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)


@triton.jit
def _capped(z, logit_scale, softcap, CAP: tl.constexpr):
    """The scaled and capped logit, from the raw one."""
    y = z * logit_scale
    if CAP:
        y = softcap * _tanh(y / softcap)
    return y


@triton.jit
def xent_kernel(
    z_ptr, target_ptr, factor_ptr,  # z[C, W], overwritten  target[C], negative if ignored  factor[C]
    loss_ptr, lse_ptr,  # [C]
    V, W, stride_zm,
    logit_scale, softcap, smoothing, z_loss,
    GRAD: tl.constexpr, HAS_FACTOR: tl.constexpr, CAP: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A program owns a row: running maximum and sum over V, then ``z ← factor · dloss/dz`` with a second read of the row, from L2.

    Each group of 8 neighbours, which one thread loads with 16 bytes, has its own running maximum. So the loop needs one
    exponential for each logit and no exchange between lanes: 9 clocks for each logit on sm_90 instead of 21, with exp2 (exp
    adds instructions that handle denormals). Columns from V to W are padding and are accessed too, by 128 bits if W is a
    multiple of 16.
    """
    # 1. the row of this program; an ignored row has loss and gradient 0
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    z_row = z_ptr + row * stride_zm
    if (target < 0) | (target >= V):
        tl.store(loss_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        if GRAD:
            for v in range(0, V, BLOCK_V):
                offs_v = v + tl.arange(0, BLOCK_V)
                zeros = tl.zeros((BLOCK_V,), z_ptr.dtype.element_ty)
                tl.store(z_row + offs_v, zeros, mask=offs_v < W)
        return

    # 2. log-sum-exp, in base 2
    group = tl.arange(0, BLOCK_V // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    top = tl.full((BLOCK_V // 8,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_V // 8,), tl.float32)
    sum_y = tl.zeros((BLOCK_V // 8,), tl.float32)
    for v in range(0, V, BLOCK_V):
        mask = v + group < V
        z = tl.load(z_row + v + group, mask=v + group < W, other=0.0).to(tl.float32)
        y = _capped(z, logit_scale, softcap, CAP)
        if SMOOTH:
            sum_y += tl.sum(tl.where(mask, y, 0.0), 1)
        y = tl.where(mask, y * 1.4426950408889634, float("-inf"))
        higher = tl.maximum(top, tl.max(y, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(y - higher[:, None]), 1)
        top = higher
    highest = tl.max(top, 0)
    lse2 = highest + tl.log2(tl.sum(total * tl.exp2(top - highest), 0))
    lse = lse2 * 0.6931471805599453

    # 3. the loss
    z_target = tl.load(z_row + target).to(tl.float32)
    y_target = _capped(z_target, logit_scale, softcap, CAP)
    loss = lse - y_target
    if SMOOTH:
        loss = (1.0 - smoothing) * loss + smoothing * (lse - tl.sum(sum_y, 0) / V)
    if Z_LOSS:
        loss += z_loss * lse * lse
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, lse)

    # 4. its gradient, written over the logits
    if GRAD:
        share_p = 1.0
        if Z_LOSS:
            share_p = 1.0 + 2.0 * z_loss * lse
        factor = logit_scale
        if HAS_FACTOR:
            factor *= tl.load(factor_ptr + row)
        for v in range(0, V, BLOCK_V):
            offs_v = v + tl.arange(0, BLOCK_V)
            mask = offs_v < W
            z = tl.load(z_row + offs_v, mask=mask, other=0.0).to(tl.float32)
            y = _capped(z, logit_scale, softcap, CAP)
            dz = tl.exp2(y * 1.4426950408889634 - lse2) * share_p
            if SMOOTH:
                dz -= tl.where(offs_v == target, 1.0 - smoothing, 0.0) + smoothing / V
            else:
                dz -= tl.where(offs_v == target, 1.0, 0.0)
            if CAP:
                share = y / softcap
                dz *= 1.0 - share * share
            tl.store(z_row + offs_v, (dz * factor).to(z_ptr.dtype.element_ty), mask=mask)
