"""Cross entropy of an output head, a chunk of rows at a time: the schedule of ``linear_cross_entropy``.

With ``dz`` the gradient of the summed loss at the logits of a chunk, which is written over them:

``dh = dz W + ds A``, ``ds = scale · dz B``, ``dW = dzᵀ h``, ``dbias = Σ dz``, ``dA = dsᵀ h``, ``dB = scale · dzᵀ s``.

The forward computes these while the logits of the chunk exist, and they are what is kept. All are linear in the incoming gradient. If
that is one number, the backward multiplies them by it. If it has one number for each row, only ``dh`` can be multiplied afterwards;
if a parameter needs a gradient, the forward then computes none, and the backward computes all from recomputed logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkit_kernels.core.blocks import starts
from peftkit_kernels.core.schedule import Schedule
from peftkit_kernels.low_rank import LoRA, cast
from peftkit_kernels.ops.linear_cross_entropy.reference import RowLoss, wide_dtype
from peftkit_kernels.ops.linear_cross_entropy.torch_passes import Rows, TorchPasses, add_tall_
from peftkit_kernels.ops.linear_cross_entropy.triton_passes import TritonPasses

Passes = TorchPasses | TritonPasses


class Grads(NamedTuple):
    """The tensors that may need a gradient, their gradients, whether each is needed, or the dtypes of those that are."""

    hidden: Any
    weight: Any
    bias: Any
    A: Any
    B: Any


class Head(NamedTuple):
    """The arguments.

    Attributes:
        hidden: ``[M, D]``.
        weight: ``[V, D]``.
        bias: ``[V]``.
        lora: The adapter, without dropout.
        target: ``Int64[M]``.
        row_loss: The loss of one row.
        ignore_index: The target of rows without loss and gradient.
        per_row: Whether the result is the loss of each row instead of their sum.
        chunk: Rows in a chunk.
        dtype: Dtype of the products with the head.
        wanted: The dtype of each gradient that will be needed, ``None`` for the others. The forward computes these gradients.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora: LoRA | None
    target: Tensor
    row_loss: RowLoss
    ignore_index: int
    per_row: bool
    chunk: int
    dtype: torch.dtype
    wanted: Grads


class Made(NamedTuple):
    """What the forward makes for the backward.

    Attributes:
        grads: The gradients of the summed loss, those of parameters in float32 or float64; ``None`` if they are to be computed in
            the backward.
        places: The rows whose gradient ``grads.hidden`` contains, ``None`` for all.
        M: The number of rows if ``places`` is not ``None``.
    """

    grads: Grads | None
    places: Tensor | None
    M: int | None


class Kept(NamedTuple):
    """What the backward needs: what the forward has made, or all arguments if it has made no gradients."""

    made: Made
    call: Head | None
    wanted: Grads


def forward(P: Passes, call: Head) -> tuple[Tensor, Made]:
    """The loss, and its gradients."""
    later = _computes_later(call)
    losses, grads, places = sweep(P, call, Grads(*[None] * 5) if later else call.wanted)
    M = None if places is None else call.target.shape[0]
    made = Made(None, None, None) if later else Made(grads, places, M)
    if not call.per_row:
        return losses.sum(), made
    if places is not None:
        losses = losses.new_zeros(call.target.shape).index_copy_(0, places, losses)
    return losses, made


def sweep(
    P: Passes, call: Head, wanted: Grads, factor: Tensor | None = None
) -> tuple[Tensor, Grads, Tensor | None]:
    """One pass over the chunks.

    Args:
        P: The passes.
        call: The arguments.
        wanted: The gradients to compute, those that are not ``None``.
        factor: ``[M]``, for each row a factor on its gradient.

    Returns:
        The loss of every row that was computed, the gradients, and which rows these are, ``None`` for all.
    """
    hidden, target, ignored, places = P.select(call.hidden, call.target, call.ignore_index)
    if factor is not None and places is not None:
        factor = factor[places]
    lora = None if call.lora is None else P.adapter(call.lora, call.dtype)
    weight, V, wide = call.weight, call.weight.shape[0], wide_dtype(call.dtype)
    losses = hidden.new_empty(hidden.shape[0], dtype=wide)
    grads = _empty_grads(call._replace(hidden=hidden), wanted)
    for total in grads[1:]:
        if total is not None:
            total.zero_()
    dhidden, dweight, dbias, dA, dB = grads
    want_grad = any(grad is not None for grad in grads)
    needs_ds = dhidden is not None or dA is not None
    for start in starts(hidden.shape[0], call.chunk):
        rows = slice(start, start + call.chunk)
        # 1. the logits of this chunk, in the first V columns of memory
        h = cast(hidden[rows], call.dtype)
        s = None if lora is None else P.shrink(h, lora.A)
        memory = P.logits(h, weight, call.bias, s, lora)
        # 2. the loss of its rows; the gradient is written over the logits
        losses[rows] = P.row_losses_(
            *(memory, target[rows], call.row_loss),
            vocabulary=V,
            ignored=None if ignored is None else ignored[rows],
            factor=None if factor is None else factor[rows],
            want_grad=want_grad,
        )
        # 3. all gradients, from that of the logits
        if want_grad:
            dz = memory[:, :V]
            if dweight is not None:
                add_tall_(dweight, dz, h, 1.0)
            if dbias is not None:
                dbias.add_(dz.sum(0, dtype=wide))
            ds = None
            if lora is not None and s is not None:
                ds = P.grads_at_output(dz, s, lora, dB, needs_ds)
            if dA is not None and ds is not None:
                P.add_grad_a_(dA, ds, h)
            if dhidden is not None:
                P.write_grad_hidden(dhidden[rows], dz, weight, ds, lora)
            del dz
        # freed before the next chunk is allocated, so that the allocator can return the same memory
        del memory
    return losses, grads, places


def trained(call: Head) -> Grads:
    """The input and all parameters of the head."""
    lora = call.lora
    return Grads(call.hidden, call.weight, call.bias, lora and lora.A, lora and lora.B)


def keep(call: Head, loss: Tensor, made: Made, needs: Grads) -> Kept:
    """What the backward needs."""
    return Kept(made, call if made.grads is None else None, call.wanted)


def backward(P: Passes, kept: Kept, dloss: Tensor, needs: Grads) -> Grads:
    """The gradients that are needed: those of the forward multiplied by ``dloss``, or all from recomputed logits."""
    made, call, wanted = kept
    if made.grads is not None:
        pairs = zip(made.grads, needs, strict=True)
        dhidden, *grads = (grad if needed else None for grad, needed in pairs)
        dhidden = None if dhidden is None else P.scaled(dhidden, dloss, made.places)
        grads = [None if grad is None else grad * dloss for grad in grads]
        places, M = made.places, made.M
    else:
        assert call is not None, "a forward without gradients keeps its arguments"
        pairs = zip(wanted, needs, strict=True)
        now = Grads(*(dtype if needed else None for dtype, needed in pairs))
        # the gradient of a sum over the losses is one number expanded over all rows, with stride 0
        _, (dhidden, *grads), places = sweep(P, call, now, dloss.contiguous())
        M = call.target.shape[0]
    if dhidden is not None and places is not None:
        # rows without a target have a gradient of 0
        dhidden = dhidden.new_zeros(M, dhidden.shape[1]).index_copy_(0, places, dhidden)
    pairs = zip((dhidden, *grads), wanted, strict=True)
    return Grads(*(None if grad is None else cast(grad, dtype) for grad, dtype in pairs))


def like(call: Head) -> tuple[Tensor, Made]:
    """Uninitialised results of ``forward``."""
    loss = call.hidden.new_empty(
        call.target.shape if call.per_row else (), dtype=wide_dtype(call.dtype)
    )
    grads = None if _computes_later(call) else _empty_grads(call, call.wanted)
    return loss, Made(grads, None, None)


def like_grads(kept: Kept, dloss: Tensor, needs: Grads) -> Grads:
    """Uninitialised results of ``backward``."""
    sources = kept.made.grads if kept.call is None else trained(kept.call)
    assert sources is not None
    every = zip(sources, kept.wanted, needs, strict=True)
    return Grads(
        *(t.new_empty(t.shape, dtype=dtype) if needed else None for t, dtype, needed in every)
    )


def _computes_later(call: Head) -> bool:
    """Whether the backward computes the gradients: a sum over rows cannot be multiplied by one number for each row afterwards."""
    return call.per_row and any(dtype is not None for dtype in call.wanted[1:])


def _empty_grads(call: Head, wanted: Grads) -> Grads:
    """Memory for the gradients that are not ``None`` in ``wanted``: that of ``hidden`` in its dtype, the others wide enough to sum in."""
    dtypes = call.hidden.dtype, *[wide_dtype(call.dtype)] * 4
    every = zip(trained(call), dtypes, wanted, strict=True)
    return Grads(
        *(None if one is None else t.new_empty(t.shape, dtype=dtype) for t, dtype, one in every)
    )


linear_cross_entropy = Schedule(
    "linear_cross_entropy",
    TorchPasses,
    TritonPasses,
    forward=forward,
    keep=keep,
    backward=backward,
    trained=trained,
    like=like,
    like_grads=like_grads,
    tuples=(RowLoss, Head, Grads, Made, Kept, Rows),
)
