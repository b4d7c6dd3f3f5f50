"""Merges two attention parts, and computes the gradient of a gate: o, dout ``[B, S, H, D]``, log-sum-exps ``[B, H, S]``.

All tensors are contiguous. Program (i, j) owns head i % H of sequence i // H and the j-th block of positions, so it needs only
one gate.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(pid, S, H, D, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """The positions of this program, the offsets of their elements, and the mask of these elements."""
    offs_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    rows = ((pid // H).to(tl.int64) * S + offs_s) * H + pid % H
    mask = (offs_s < S)[:, None] & (offs_d < D)[None, :]
    return offs_s, rows[:, None] * D + offs_d[None, :], mask


@triton.jit
def merge_kernel(
    o1_ptr, o2_ptr, l1_ptr, l2_ptr,  # the parts and their log-sum-exps, None with a gate
    gate_ptr, out_ptr, total_ptr,  # gate[H] or None  total[B, H, S] or None
    S, H, D,
    HAS_GATE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``out = o1 exp(l1 - L) + o2 exp(l2 - L)`` and ``total = L = log(exp(l1) + exp(l2))``, or ``out = o1 + gate · o2``."""
    pid = tl.program_id(0)
    offs_s, offs, mask = _rows(pid, S, H, D, BLOCK_S, BLOCK_D)
    o1 = tl.load(o1_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    o2 = tl.load(o2_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_GATE:
        out = o1 + tl.load(gate_ptr + pid % H).to(tl.float32) * o2
    else:
        mask_s = offs_s < S
        offs_l = pid.to(tl.int64) * S + offs_s
        l1 = tl.load(l1_ptr + offs_l, mask=mask_s, other=0.0) * 1.4426950408889634
        l2 = tl.load(l2_ptr + offs_l, mask=mask_s, other=0.0) * 1.4426950408889634
        top = tl.maximum(l1, l2)
        e1, e2 = tl.exp2(l1 - top), tl.exp2(l2 - top)
        total = e1 + e2
        # a query that sees no key of the first part has l1 = -inf, and its o1 must not be used
        first = tl.where((e1 == 0.0)[:, None], 0.0, o1 * (e1 / total)[:, None])
        out = first + o2 * (e2 / total)[:, None]
        lse = (top + tl.log2(total)) * 0.6931471805599453
        tl.store(total_ptr + offs_l, lse, mask=mask_s)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gate_grad_kernel(
    dout_ptr, o2_ptr, gate_ptr,  # gate[H]
    do2_ptr, dgate_ptr,  # dgate[position blocks, B, H], float32
    S, H, D,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``do2 = gate · dout`` and ``dgate = Σ dout ∘ o2`` over the positions of this program, in one pass."""
    pid = tl.program_id(0)
    _, offs, mask = _rows(pid, S, H, D, BLOCK_S, BLOCK_D)
    dout = tl.load(dout_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    o2 = tl.load(o2_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    do2 = dout * tl.load(gate_ptr + pid % H).to(tl.float32)
    tl.store(do2_ptr + offs, do2.to(do2_ptr.dtype.element_ty), mask=mask)
    dgate = tl.sum(tl.sum(dout * o2, 1), 0)
    tl.store(dgate_ptr + tl.program_id(1) * tl.num_programs(0) + pid, dgate)
