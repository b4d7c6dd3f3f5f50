"""``linear_cross_entropy`` by Triton kernels around the library's GEMMs, as torch.library ops: traceable, differentiable once.

The op returns the sum over all rows, or one loss for each row; the caller divides for the mean. The gradients are computed in the
forward, chunk by chunk, and are outputs of the op that autograd keeps. All rows are computed, and those without a target are
masked, so that the host never waits for their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core.launch import cdiv
from peftkit_kernels.core.op import Differentiable, Op
from peftkit_kernels.low_rank import LoRA, cast, passes
from peftkit_kernels.ops.linear_cross_entropy.passes import xent_rows_triton_
from peftkit_kernels.ops.linear_cross_entropy.reference import RowLoss
from peftkit_kernels.ops.linear_cross_entropy.torch_impl import (
    add_tall_,
    choose_chunk,
    hidden_grad,
    tiles,
)

Tensors = list[Tensor]


def sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    target: Tensor,
    lora_scale: float,
    row_loss: RowLoss,
    chunk: int,
    dtype: torch.dtype,
    needs: Sequence[bool],
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensors]:
    """The loss of every row, and the gradients of those of the first five arguments that ``needs`` selects.

    If ``factor [M]`` is given, each row's gradient is multiplied by it. The gradient of ``hidden`` has the dtype of ``hidden``;
    the others are float32 sums over the chunks.
    """
    needs_hidden, needs_ds = needs[0], needs[0] or needs[3]
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    grads = _like_grads(hidden, weight, bias, A, B, needs)
    for grad in grads[needs_hidden:]:
        grad.zero_()
    found = iter(grads)
    dhidden, dweight, dbias, dA, dB = (next(found) if needed else None for needed in needs)
    lora = None
    if A is not None and B is not None:
        wide = torch.promote_types(dtype, A.dtype)
        lora = LoRA(cast(A, wide), cast(B, wide), lora_scale)
    for start in range(0, hidden.shape[0], chunk):
        rows = slice(start, start + chunk)
        h = cast(hidden[rows], dtype)
        s = None if lora is None else passes.shrink(h, lora.A)
        memory, V = _memory(h, weight), weight.shape[0]
        z = memory[:, :V]
        _fill_logits(z, h, weight, bias, s, lora)
        losses[rows], _ = xent_rows_triton_(
            *(memory, target[rows], row_loss),
            want_grad=any(needs),
            factor=None if factor is None else factor[rows],
            vocabulary=V,
        )
        if any(needs):
            if dweight is not None:
                add_tall_(dweight, z, h, 1.0)
            if dbias is not None:
                dbias.add_(z.sum(0, dtype=torch.float32))
            ds = _grads_at_output(z, s, lora, dB, needs_ds)
            if dA is not None:
                dA.add_(passes.grad_a(ds, h, torch.float32))
            if dhidden is not None:
                _write_hidden_grad(dhidden[rows], z, weight, ds, lora)
        # freed before the next chunk is allocated, so that the allocator can return the same memory
        del memory, z
    return losses, grads


def _like_grads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    needs: Sequence[bool],
) -> Tensors:
    grads = [hidden.new_empty(hidden.shape)] if needs[0] else []
    parameters = zip((weight, bias, A, B), needs[1:], strict=True)
    return grads + [
        t.new_empty(t.shape, dtype=torch.float32)
        for t, needed in parameters
        if needed and t is not None
    ]


def _memory(h: Tensor, weight: Tensor) -> Tensor:
    """Memory for the logits of ``h [C, D]``, with each row padded to a multiple of 16 elements.

    So for any vocabulary (for example 50,257) the kernel and the library's GEMMs access the rows by 128 bits instead of element
    by element.
    """
    return h.new_empty(h.shape[0], 16 * cdiv(weight.shape[0], 16))


def _fill_logits(
    z: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor | None,
    lora: LoRA | None,
) -> None:
    """Fill ``z = h Wᵀ + bias + scale · s Bᵀ``. The update is written first, and the library's GEMM adds to it.

    A weight of another dtype is cast a tile at a time.
    """
    bias = None if bias is None else cast(bias, h.dtype)
    added = s is not None and lora is not None
    if added:
        passes.expand(s, lora.B, lora.scale, bias=bias, out=z)
    whole = weight.dtype is h.dtype
    for tile in [slice(None)] if whole else tiles(*weight.shape):
        part, out = weight[tile].to(h.dtype).t(), z[:, tile]
        if added:
            out.addmm_(h, part)
        elif bias is None:
            torch.mm(h, part, out=out)
        else:
            torch.addmm(bias[tile], h, part, out=out)


def _grads_at_output(
    dz: Tensor, s: Tensor | None, lora: LoRA | None, dB: Tensor | None, needs_ds: bool
) -> Tensor | None:
    """Add the chunk's part to ``dB``, and return ``ds = scale · dz B`` if needed, from the same pass over ``dz``."""
    if lora is None:
        return None
    if dB is None:
        return passes.grad_s(dz, lora.B, lora.scale) if needs_ds else None
    if needs_ds:
        part, ds = passes.grad_b_and_s(dz, s, lora.B, lora.scale, torch.float32)
    else:
        part, ds = passes.grad_b(dz, s, lora.scale, torch.float32), None
    dB.add_(part)
    return ds


def _write_hidden_grad(
    out: Tensor, dz: Tensor, weight: Tensor, ds: Tensor | None, lora: LoRA | None
) -> None:
    """Fill ``out = dz W + ds A``."""
    update = None
    if lora is not None and ds is not None:
        update = passes.expand(ds, lora.A.t(), 1.0, dtype=dz.dtype)
    if not dz.dtype is weight.dtype is out.dtype:
        dh = hidden_grad(dz, weight)
        out.copy_(dh if update is None else dh.add_(update))
    elif update is None:
        torch.mm(dz, weight, out=out)
    else:
        torch.addmm(update, dz, weight, out=out)


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    target: Tensor,
    lora_scale: float,
    logit_scale: float,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    chunk: int,
    dtype: torch.dtype,
    per_row: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensors]:
    """The loss of ``hidden [M, D]``, summed or ``per_row``, and the gradients of those of the first five arguments that need one.

    The gradients of parameters sum over rows, so they cannot be multiplied with one number for each row afterwards. With
    ``per_row``, if any parameter needs a gradient, this op computes none; ``deferred`` computes all of them in backward.
    """
    made = needs if _makes_grads(per_row, needs) else [False] * 5
    losses, grads = sweep(
        *(hidden, weight, bias, A, B, _counted(target, ignore_index), lora_scale),
        *(RowLoss(logit_scale, softcap, label_smoothing, z_loss), chunk, dtype, made),
    )
    return losses if per_row else losses.sum(), grads


def _makes_grads(per_row: bool, needs: Sequence[bool]) -> bool:
    return not per_row or not any(needs[1:])


def _counted(target: Tensor, ignore_index: int) -> Tensor:
    return target.masked_fill(target == ignore_index, -1)


def _empty_outputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    target: Tensor,
    *numbers: Any,
) -> tuple[Tensor, Tensors]:
    *_, per_row, needs = numbers
    loss = hidden.new_empty(target.shape if per_row else (), dtype=torch.float32)
    made = _makes_grads(per_row, needs)
    return loss, _like_grads(hidden, weight, bias, A, B, needs) if made else []


def deferred(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    target: Tensor,
    lora_scale: float,
    logit_scale: float,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    chunk: int,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> Tensors:
    """The gradients for ``dloss [M]``, one number for each row, from recomputed logits."""
    _, grads = sweep(
        *(hidden, weight, bias, A, B, _counted(target, ignore_index), lora_scale),
        *(RowLoss(logit_scale, softcap, label_smoothing, z_loss), chunk, dtype, needs),
        # the gradient of a sum over the losses is one number expanded over all rows, with stride 0
        factor=dloss.contiguous(),
    )
    return grads


def _deferred_like(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    target: Tensor,
    *numbers: Any,
) -> Tensors:
    return _like_grads(hidden, weight, bias, A, B, numbers[-1])


def scale_rows(grad: Tensor, factor: Tensor) -> Tensor:
    """``factor · grad`` in the dtype of ``grad [M, D]`` for a ``factor`` of ``Float32[]`` or ``Float32[M]``: one pass, rounded once."""
    return torch.mul(grad, factor.reshape(-1, 1), out=torch.empty_like(grad))


_TENSORS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? A, Tensor? B, Tensor target"
_NUMBERS = (
    "float lora_scale, float logit_scale, float? softcap, float label_smoothing, float z_loss, int ignore_index,"
    " int chunk, ScalarType dtype"
)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensors]) -> None:
    *numbers, per_row, needs = inputs[6:]
    ctx.makes_grads, ctx.numbers, ctx.needs = _makes_grads(per_row, needs), numbers, needs
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:5]]
    ctx.save_for_backward(*(output[1] if ctx.makes_grads else inputs[:6]))


def _backward(ctx: Any, needs: Sequence[bool], dloss: Tensor) -> tuple[Tensor | None, ...]:
    """All gradients are linear in ``dloss``, so those computed in the forward are multiplied by it."""
    if ctx.makes_grads:
        found = iter(ctx.saved_tensors)
        grads = [next(found) if needed else None for needed in ctx.needs]
        if grads[0] is not None:
            grads[0] = _scale_op(grads[0], dloss)
        grads[1:] = [None if grad is None else grad * dloss for grad in grads[1:]]
    else:
        found = iter(_deferred_op(dloss, *ctx.saved_tensors, *ctx.numbers, ctx.needs))
        grads = [next(found) if needed else None for needed in ctx.needs]
    pairs = zip(grads, ctx.dtypes, strict=True)
    return tuple(None if grad is None else cast(grad, dtype) for grad, dtype in pairs)


_forward_op = Op(
    "linear_cross_entropy",
    f"({_TENSORS}, {_NUMBERS}, bool per_row, bool[] needs) -> (Tensor, Tensor[])",
    forward,
    _empty_outputs,
)
_op = Differentiable(_forward_op, ("hidden", "weight", "bias", "A", "B"), _keep, _backward)
_deferred_op = Op(
    "linear_cross_entropy_deferred",
    f"(Tensor dloss, {_TENSORS}, {_NUMBERS}, bool[] needs) -> Tensor[]",
    deferred,
    _deferred_like,
)
_scale_op = Op(
    "scale_rows",
    "(Tensor grad, Tensor factor) -> Tensor",
    scale_rows,
    lambda grad, factor: torch.empty_like(grad),
)


def linear_cross_entropy_triton(
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
    """As ``linear_cross_entropy_torch``; nothing waits for the device."""
    factors = (None, None) if lora is None else (lora.A, lora.B)
    tensors = hidden, weight, bias, *factors
    enabled = torch.is_grad_enabled()
    needs = [enabled and t is not None and t.requires_grad for t in tensors]
    M, V = hidden.shape[0], weight.shape[0]
    return _op(
        *(*tensors, target, 1.0 if lora is None else lora.scale),
        *(row_loss.logit_scale, row_loss.softcap, row_loss.label_smoothing, row_loss.z_loss),
        *(ignore_index, chunk or choose_chunk(M, V, itemsize=compute_dtype.itemsize, cpu=False)),
        *(compute_dtype, reduction == "none", needs),
    )
