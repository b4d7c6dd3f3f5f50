"""``linear_cross_entropy`` from torch ops: one chunk of logits at a time; its gradients are computed while it exists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkit_kernels import low_rank, native
from peftkit_kernels.core.autograd import once_differentiable, run
from peftkit_kernels.gemm import matmul_nn, matmul_nt
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.linear_cross_entropy.reference import RowLoss, wide_dtype

_CPU_CHUNK_BYTES = 2**25
"""Largest buffer of logits on the CPU. Each product of a chunk reads the whole head through the cache, so chunks of few rows
take longer than a buffer that is larger than the cache. Two Zen 5 cores with 32 MiB of cache, float32, M 512, D 576, V 49152, forward and
backward: chunks of 32 rows (6 MiB) 364 ms, 64 (12 MiB) 292, 128 (24 MiB) 242, 256 (48 MiB) 247, 512 (96 MiB) 263;
all logits at once by autograd 636 ms.
"""
_GPU_CHUNK_BYTES = 2**28
_GPU_MIN_ROWS = 256

_TILE_BYTES = 2**24
"""The largest allocation for a cast of weights or logits."""


class Head(NamedTuple):
    """The tensors of ``z = h Wᵀ + bias + scale · h Aᵀ Bᵀ``; or, in this order, whether each of them needs a gradient."""

    weight: Any
    bias: Any
    A: Any
    B: Any


@dataclass(frozen=True, slots=True)
class Plan:
    """The arguments of one call that are not tensors."""

    row_loss: RowLoss
    reduction: str
    ignore_index: int
    lora_scale: float
    chunk: int
    dtype: torch.dtype
    """Dtype of the products with the head."""


def linear_cross_entropy_torch(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    lora: LoRA | None,
    row_loss: RowLoss,
    ignore_index: int,
    reduction: str,
    chunk: int | None,
    compute_dtype: torch.dtype,
) -> Tensor:
    """As ``linear_cross_entropy_reference``, for ``hidden [M, D]``, ``target [M]`` and reduction ``"sum"`` or ``"none"``."""
    M, V = hidden.shape[0], weight.shape[0]
    plan = Plan(
        row_loss,
        reduction,
        ignore_index,
        lora.scale if lora else 1.0,
        chunk
        or choose_chunk(M, V, itemsize=compute_dtype.itemsize, cpu=hidden.device.type == "cpu"),
        compute_dtype,
    )
    head = Head(weight, bias, lora.A if lora else None, lora.B if lora else None)
    return run(_LinearCrossEntropy, hidden, *head, target, plan)


def choose_chunk(M: int, V: int, *, itemsize: int, cpu: bool) -> int:
    """Rows in a chunk, for ``M`` rows of ``V`` logits of ``itemsize`` bytes."""
    row_bytes = V * itemsize
    if not cpu:
        return max(_GPU_MIN_ROWS, 1 << max(_GPU_CHUNK_BYTES // row_bytes, 1).bit_length() - 1)
    limit = max(_CPU_CHUNK_BYTES // row_bytes, 16)
    chunks = max(-(-M // limit), 1)
    return max(-(-M // chunks), 1)


def xent_rows_(
    z: Tensor, target: Tensor, row_loss: RowLoss, *, ignored: Tensor | None, want_grad: bool
) -> tuple[Tensor, Tensor]:
    """One pass over a chunk of raw logits: the loss of each row; the gradient is written over ``z``.

    Args:
        z: ``[C, V]``. It is overwritten by ``dloss/dz``; without ``want_grad`` its values afterwards have no meaning.
        target: ``Int64[C]`` in [0, V), also for ignored rows.
        row_loss: The loss of one row.
        ignored: ``Bool[C]``, true for rows whose loss and gradient are 0; ``None`` if there are none.
        want_grad: Whether the gradient is needed.

    Returns:
        ``(loss, lse)``, both ``[C]`` and float32 (float64 for float64).
    """
    if z.dtype.itemsize >= 4:
        return _xent_wide_rows_(z, target, row_loss, ignored, want_grad)
    loss, lse = z.new_empty(2, z.shape[0], dtype=torch.float32)
    for rows in tiles(z.shape[0], z.shape[1]):
        y = z[rows].float()
        skip = None if ignored is None else ignored[rows]
        loss[rows], lse[rows] = _xent_wide_rows_(y, target[rows], row_loss, skip, want_grad)
        if want_grad:
            z[rows] = y
    return loss, lse


def _xent_wide_rows_(
    z: Tensor, target: Tensor, row_loss: RowLoss, ignored: Tensor | None, want_grad: bool
) -> tuple[Tensor, Tensor]:
    """``xent_rows_`` for float32 and float64."""
    cap, smoothing, index = row_loss.softcap, row_loss.label_smoothing, target[:, None]
    slope = None
    if row_loss.logit_scale != 1.0:
        z.mul_(row_loss.logit_scale)
    if cap is None and native.supports(z):
        counted = target if ignored is None else target.masked_fill(ignored, -1)
        return native.cross_entropy_(z, counted, smoothing, row_loss.z_loss, row_loss.logit_scale)
    if cap is not None:
        z.div_(cap).tanh_()
        slope = 1 - z * z if want_grad else None
        z.mul_(cap)

    loss = z.gather(1, index).squeeze(1).mul_(smoothing - 1)
    if smoothing:
        loss.sub_(z.mean(1), alpha=smoothing)
    top = z.amax(1)
    torch.softmax(z, 1, out=z)
    # lse from the largest probability, which is at least 1 / V: its logarithm is always finite, that of the target may not be
    lse = top - z.amax(1).log_()
    loss.add_(lse)
    if row_loss.z_loss:
        loss.add_(lse.square(), alpha=row_loss.z_loss)
    if ignored is not None:
        loss.masked_fill_(ignored, 0.0)
    if not want_grad:
        return loss, lse

    if row_loss.z_loss:
        z.mul_((1 + 2 * row_loss.z_loss * lse)[:, None])
    if smoothing:
        z.sub_(smoothing / z.shape[1])
    z.scatter_(1, index, z.gather(1, index).sub_(1 - smoothing))
    if slope is not None:
        z.mul_(slope)
    if row_loss.logit_scale != 1.0:
        z.mul_(row_loss.logit_scale)
    if ignored is not None:
        z.masked_fill_(ignored[:, None], 0.0)
    return loss, lse


class _LinearCrossEntropy(torch.autograd.Function):
    """With ``dz`` the gradient of the summed loss, computed chunk by chunk in the forward:

    ``dh = dz W + ds A``, ``ds = scale · dz B``, ``dW = dzᵀ h``, ``dbias = Σ dz``, ``dA = dsᵀ h``,
    ``dB = scale · dzᵀ s``. If the incoming gradient is one number, backward multiplies all of them with it. If it has one
    number for each row (``"none"``), only ``dh`` can be multiplied afterwards; backward then computes all gradients from
    recomputed logits if a parameter needs one.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *args: Any) -> Tensor:
        *tensors, target, plan = args
        head = Head(*tensors)
        needs_hidden, wanted = ctx.needs_input_grad[0], Head(*ctx.needs_input_grad[1:5])
        ctx.shape, ctx.dtypes = hidden.shape, [t if t is None else t.dtype for t in (hidden, *head)]
        ctx.deferred = None
        if plan.reduction == "none" and any(wanted):
            loss, _, _ = _loss_and_grads(hidden, head, target, plan, False, Head(*[False] * 4))
            ctx.save_for_backward(hidden, *head, target)
            ctx.deferred = plan, needs_hidden, wanted
            return loss
        loss, keep, grads = _loss_and_grads(hidden, head, target, plan, needs_hidden, wanted)
        ctx.save_for_backward(keep, *grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.deferred is not None:
            hidden, *tensors, target = ctx.saved_tensors
            plan, needs_hidden, wanted = ctx.deferred
            head = Head(*tensors)
            _, keep, grads = _loss_and_grads(
                hidden, head, target, plan, needs_hidden, wanted, row_factor=dloss
            )
            factor: Tensor | None = None
        else:
            keep, *grads = ctx.saved_tensors
            factor = dloss
        dhidden, *dhead = grads
        if dhidden is not None:
            dhidden = _scaled(dhidden, factor, keep, ctx.shape).to(ctx.dtypes[0])
        for i, grad in enumerate(dhead):
            if grad is not None:
                dhead[i] = (grad if factor is None else grad * factor).to(ctx.dtypes[1 + i])
        return dhidden, *dhead, None, None


def _scaled(
    dhidden: Tensor, factor: Tensor | None, keep: Tensor | None, shape: torch.Size
) -> Tensor:
    """``factor · dhidden``, with zeros in the rows that were not computed."""
    if factor is not None:
        if factor.dim():
            factor = (factor if keep is None else factor[keep])[:, None].to(dhidden.dtype)
        dhidden = dhidden * factor
    return dhidden if keep is None else dhidden.new_zeros(shape).index_copy_(0, keep, dhidden)


def _loss_and_grads(
    hidden: Tensor,
    head: Head,
    target: Tensor,
    plan: Plan,
    needs_hidden: bool,
    wanted: Head,
    row_factor: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
    """The reduced loss, the indices of the computed rows (``None`` for all), and the gradients of the summed loss.

    On the CPU ignored rows are not computed, so that a prompt needs no product with the head. On a GPU the host would have to
    wait for their number, so they are computed and masked.
    """
    counted = target != plan.ignore_index
    keep = ignored = None
    rows, row_target = hidden, target
    if hidden.device.type == "cpu":
        keep = counted.nonzero().squeeze(1)
        if keep.shape[0] == target.shape[0]:
            keep = None
        else:
            rows, row_target = hidden[keep], target[keep]
            row_factor = None if row_factor is None else row_factor[keep]
    else:
        ignored, row_target = ~counted, target.where(counted, 0)
    loss, grads = _sweep(rows, head, row_target, plan, needs_hidden, wanted, ignored, row_factor)
    if plan.reduction == "none":
        if keep is not None:
            loss = loss.new_zeros(target.shape).index_copy_(0, keep, loss)
        return loss, keep, grads
    return loss.sum(), keep, grads


def _sweep(
    hidden: Tensor,
    head: Head,
    target: Tensor,
    plan: Plan,
    needs_hidden: bool,
    wanted: Head,
    ignored: Tensor | None,
    row_factor: Tensor | None,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The loss of every row, and the gradients of ``hidden`` and of the ``wanted`` tensors of the head.

    If ``row_factor`` is given, the gradient of each row is multiplied by it.
    """
    weight, bias, A, B = head
    wide, want_grad = wide_dtype(plan.dtype), needs_hidden or any(wanted)
    losses = hidden.new_empty(hidden.shape[0], dtype=wide)
    dhidden = torch.empty_like(hidden) if needs_hidden else None
    dweight, dbias, dA, dB = (
        torch.zeros(t.shape, dtype=wide, device=t.device) if needed else None
        for t, needed in zip(head, wanted, strict=True)
    )
    lora = None if A is None else LoRA(A, B, plan.lora_scale)
    for start in range(0, hidden.shape[0], plan.chunk):
        chunk = slice(start, start + plan.chunk)
        h = hidden[chunk].to(plan.dtype)
        z = _logits(h, weight, bias)
        s = None if A is None else low_rank.shrink(h, A)
        if lora is not None and s is not None:
            low_rank.expand_(z, s, lora.B, lora.scale)
        skip = None if ignored is None else ignored[chunk]
        losses[chunk], _ = xent_rows_(
            z, target[chunk], plan.row_loss, ignored=skip, want_grad=want_grad
        )
        if not want_grad:
            # freed before the next chunk is allocated, so that the allocator can return the same memory
            del z
            continue
        if row_factor is not None:
            z.mul_(row_factor[chunk, None].to(z.dtype))
        if dweight is not None:
            add_tall_(dweight, z, h, 1.0)
        if dbias is not None:
            dbias.add_(z.sum(0, dtype=wide))
        if dB is not None and lora is not None and s is not None:
            add_tall_(dB, z, s, lora.scale)
        dh = hidden_grad(z, weight) if needs_hidden else None
        if lora is not None and (needs_hidden or dA is not None):
            ds = low_rank.grad_s(z, lora.B, lora.scale)
            if dA is not None:
                add_tall_(dA, ds, h, 1.0)
            if dh is not None:
                low_rank.expand_grad_(dh, ds, lora.A)
        if dhidden is not None and dh is not None:
            dhidden[chunk] = dh
        del z
    return losses, (dhidden, dweight, dbias, dA, dB)


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``h Wᵀ + bias`` in the dtype of ``h``; a weight of another dtype is cast a tile at a time."""
    if weight.dtype == h.dtype:
        return _linear(h, weight, bias)
    z = h.new_empty(h.shape[0], weight.shape[0])
    for tile in tiles(*weight.shape):
        z[:, tile] = _linear(h, weight[tile].to(h.dtype), None if bias is None else bias[tile])
    return z


def _linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return matmul_nt(h, weight)
    bias = bias.to(h.dtype)
    if h.dtype.itemsize < 4:
        # F.linear adds the bias inside the product and rounds once; adding it afterwards would round twice
        return torch.nn.functional.linear(h, weight, bias)
    return matmul_nt(h, weight).add_(bias)


def hidden_grad(dz: Tensor, weight: Tensor) -> Tensor:
    """``dz W`` in the dtype of ``dz``; a weight of another dtype is cast a tile at a time."""
    if weight.dtype == dz.dtype:
        return matmul_nn(dz, weight)
    dh = dz.new_zeros(dz.shape[0], weight.shape[1], dtype=wide_dtype(dz.dtype))
    for tile in tiles(*weight.shape):
        dh.add_(matmul_nn(dz[:, tile], weight[tile].to(dz.dtype)))
    return dh.to(dz.dtype)


def add_tall_(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """``total += scale · leftᵀ right`` in the dtype of ``total``; columns of a 16-bit ``left`` are cast a tile at a time."""
    right = right.to(total.dtype)
    if left.dtype == total.dtype:
        total.addmm_(left.t(), right, alpha=scale)
        return
    for tile in tiles(left.shape[1], left.shape[0]):
        total[tile].addmm_(left[:, tile].to(total.dtype).t(), right, alpha=scale)


def tiles(rows: int, columns: int) -> Iterator[slice]:
    """Slices of ``rows``; each has at most ``_TILE_BYTES`` of float32 numbers, with ``columns`` numbers in each row."""
    step = max(_TILE_BYTES // (4 * max(columns, 1)), 1)
    for start in range(0, rows, step):
        yield slice(start, start + step)
