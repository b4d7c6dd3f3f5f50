"""The public function: checks, autocast, shifted targets, choice of backend."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from peftkit_kernels.core.checks import autocast_dtype, check_lora, without_autocast
from peftkit_kernels.core.dispatch import Backend, choose_backend, is_transformed
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.linear_cross_entropy import schedule
from peftkit_kernels.ops.linear_cross_entropy.config import choose_chunk
from peftkit_kernels.ops.linear_cross_entropy.reference import (
    RowLoss,
    linear_cross_entropy_reference,
    mean_divisor,
)

Reduction = Literal["mean", "sum", "none"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    shift: bool = False,
    num_items: Tensor | int | None = None,
    chunk: int | None = None,
    compute_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Cross entropy of the output head ``z = h Wᵀ + bias + scale · h Aᵀ Bᵀ``, which never stores ``z`` for all rows.

    The op processes chunks of rows. It computes the gradients in the forward, while the logits of a chunk exist, so nothing
    is recomputed. Kept for backward: ``dhidden`` (``[M, D]``) and the gradients of the trained parameters of the head:
    ``float32[V, D]`` for a trained ``weight``, ``float32[R, D]`` and ``float32[V, R]`` for ``lora``. Only
    ``reduction="none"`` with trained parameters computes the logits a second time, in backward.
    Under ``torch.compile`` on the CPU the definition runs, and the compiler fuses it.

    Args:
        hidden: ``[..., D]``.
        weight: ``[V, D]``, trained or frozen.
        target: ``Int64[...]``, one per row of ``hidden``, in [0, V) or ``ignore_index``.
        bias: ``[V]`` or ``None``.
        lora: Adapter on the head, without dropout. It is computed in float32 if its factors are float32 and ``hidden`` 16-bit.
        ignore_index: Rows with this target have loss and gradient 0 and are not counted. If no row is counted, the mean is
            NaN (0 / 0) and all gradients are 0, as in ``torch.nn.functional.cross_entropy``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one loss for each row, 0 for an ignored row).
        softcap: The logits become ``softcap · tanh(z / softcap)``.
        label_smoothing: Share of the target spread evenly over the vocabulary, in [0, 1).
        z_loss: Weight of the squared log-partition of each row.
        logit_scale: Factor on the logits, applied before ``softcap``.
        shift: Pair ``hidden[..., t, :]`` with ``target[..., t + 1]``; the last position of a sequence is ignored.
        num_items: Divisor of the mean instead of the number of counted rows (for gradient accumulation); may be 0.
        chunk: Rows processed at a time. ``None`` chooses the number from the sizes.
        compute_dtype: Dtype of the products with the head. ``None`` means that of ``hidden``, or of autocast if it is on.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        A float32 number (float64 for float64), or ``[...]`` numbers for ``reduction="none"``.

    Raises:
        ValueError: Shapes or dtypes do not fit, an option or (on the CPU) a target is out of range, or the backend cannot
            run. On a GPU a target out of range fails as a device-side assertion, so that nothing waits for the check.
    """
    dtype = compute_dtype or autocast_dtype(hidden) or hidden.dtype
    check_shapes(hidden, weight, target, bias, lora)
    check_options(reduction, softcap, label_smoothing, num_items, chunk)
    if shift:
        target = torch.nn.functional.pad(target[..., 1:], (0, 1), value=ignore_index)
    if not is_transformed():
        check_target(target, weight.shape[0], ignore_index)
    cap = None if softcap is None else float(softcap)
    row_loss = RowLoss(float(logit_scale), cap, float(label_smoothing), float(z_loss))
    with without_autocast(hidden):
        # choose_backend checks the dtype of its first tensor, which must be that of the products
        first = hidden if dtype is hidden.dtype else hidden.new_empty(0, dtype=dtype)
        tensors, rank = [first, hidden, weight, target, bias], 0
        if lora is not None:
            tensors, rank = [*tensors, lora.A, lora.B], lora.A.shape[0]
        chosen = choose_backend(
            "linear_cross_entropy", backend, *tensors, rank=rank, has_dot=lora is not None
        )
        # a head without inputs has logits, but a schedule without elements in its input computes nothing
        if chosen == "reference" or not hidden.shape[-1]:
            return linear_cross_entropy_reference(
                hidden,
                weight,
                target,
                bias=bias,
                lora=lora,
                row_loss=row_loss,
                ignore_index=ignore_index,
                reduction=reduction,
                num_items=num_items,
                compute_dtype=dtype,
            )
        rows = hidden.reshape(-1, hidden.shape[-1])
        if chunk is None:
            cpu = chosen == "torch" and hidden.device.type == "cpu"
            sizes = rows.shape[0], weight.shape[0]
            chunk = choose_chunk(*sizes, itemsize=dtype.itemsize, cpu=cpu)
        parts = rows, weight, bias, *((None, None) if lora is None else (lora.A, lora.B))
        call = schedule.Head(
            *(rows, weight, bias, lora, target.reshape(-1), row_loss, ignore_index),
            *(reduction == "none", chunk, dtype, schedule.Grads(*map(_wanted, parts))),
        )
        losses = schedule.linear_cross_entropy(chosen, call)
    counted = target != ignore_index
    if reduction == "none":
        return with_gradient_where(counted, losses.reshape(target.shape))
    loss = with_gradient_where(counted.any(), losses)
    if reduction == "sum":
        return loss
    return loss / mean_divisor(counted.sum() if num_items is None else num_items, loss)


def _wanted(t: Tensor | None) -> torch.dtype | None:
    """The dtype of the gradient of ``t``, or ``None`` if no gradient will be needed."""
    return t.dtype if t is not None and t.requires_grad and torch.is_grad_enabled() else None


def with_gradient_where(counted: Tensor, loss: Tensor) -> Tensor:
    """``loss``, whose gradient is exactly 0 where ``counted`` is false.

    The op multiplies the gradients from its forward by the incoming one. The incoming one is infinite after a division by 0
    items, and zero times infinity is NaN.
    """
    return loss.where(counted, loss.detach()) if loss.requires_grad else loss


def check_shapes(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, lora: LoRA | None
) -> None:
    """Raise ``ValueError`` unless the tensors fit each other."""
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} and hidden {tuple(hidden.shape)}; "
            "weight must be [V, D] for hidden [..., D]"
        )
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target has shape {tuple(target.shape)} and hidden {tuple(hidden.shape)}; "
            f"with one target for each row it must be {tuple(hidden.shape[:-1])}"
        )
    if target.dtype is not torch.int64:
        raise ValueError(
            f"target is {target.dtype}; class indices must be torch.int64; pass target.long()"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be [{weight.shape[0]}]")
    if lora is not None:
        check_lora(lora, weight, "lora")
        if lora.p:
            raise ValueError(
                f"lora.p={lora.p}: dropout on the output head is not supported; use p=0"
            )


def check_options(
    reduction: str,
    softcap: float | None,
    label_smoothing: float,
    num_items: Tensor | int | None,
    chunk: int | None,
) -> None:
    """Raise ``ValueError`` for an option out of range."""
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"reduction={reduction!r} is unknown; use one of {', '.join(get_args(Reduction))}"
        )
    if num_items is not None and reduction != "mean":
        raise ValueError(
            f"num_items divides the mean, but reduction is {reduction!r}; use reduction='mean' or leave out num_items"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be positive; pass None for no cap")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1)")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 row; pass None to have it chosen")


def check_target(target: Tensor, V: int, ignore_index: int) -> None:
    """Raise unless every target is a class or ``ignore_index``; on a GPU the device asserts it instead."""
    outside = ((target < 0) | (target >= V)) & (target != ignore_index)
    if target.device.type != "cpu":
        torch.ops.aten._assert_async.msg(~outside.any(), f"target outside [0, {V})")
    elif outside.any():
        raise ValueError(
            f"target contains {target[outside][0].item()}, outside [0, {V}); the target of an ignored row must be {ignore_index}"
        )
