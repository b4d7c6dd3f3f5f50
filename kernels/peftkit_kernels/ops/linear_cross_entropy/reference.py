"""The definition of ``linear_cross_entropy``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peftkit_kernels.low_rank import LoRA, adapter_dtype


class RowLoss(NamedTuple):
    """The loss of one row of raw logits ``z [V]`` and its target.

    With ``y = softcap · tanh(logit_scale · z / softcap)`` (without softcap ``y = logit_scale · z``) and
    ``lse = log Σ exp(y)`` the loss of the row is
    ``lse - (1 - ε) · y[target] - ε · mean(y) + z_loss · lse²``, with ``ε = label_smoothing``.

    Attributes:
        logit_scale: Factor on the logits (Cohere; Granite divides).
        softcap: Bound on the logits (Gemma 2), or ``None``.
        label_smoothing: Share of the target spread evenly over the vocabulary, in [0, 1).
        z_loss: Weight of the squared log-partition (Chowdhery et al., 2022, arXiv:2204.02311).
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and sums: float64 for float64, float32 for all others."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    row_loss: RowLoss | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: Tensor | int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Cross entropy of ``z = h Wᵀ + bias + scale · h Aᵀ Bᵀ``, with all of ``z`` in memory.

    Args:
        hidden: ``[..., D]``.
        weight: ``[V, D]``.
        target: ``Int64[...]``, in [0, V) or ``ignore_index``.
        bias: ``[V]`` or ``None``.
        lora: Adapter on the head, or ``None``.
        row_loss: The loss of one row; ``None`` is plain cross entropy.
        ignore_index: Rows with this target have loss 0 and are not counted.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        num_items: Divisor of the mean instead of the number of counted rows. If the divisor is 0 the mean is NaN or infinite.
        compute_dtype: Dtype of the products (default: that of ``hidden``). All else is float32, or float64 for float64.

    Returns:
        A number, or ``[...]`` for ``"none"``.
    """
    row_loss = row_loss or RowLoss()
    dtype = compute_dtype or hidden.dtype
    rows = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    z = torch.nn.functional.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
    if lora is not None:
        factors = adapter_dtype(rows, lora.A)
        update = rows.to(factors) @ lora.A.to(factors).t() @ lora.B.to(factors).t()
        z = (z + update * lora.scale).to(dtype)
    y = z.to(wide_dtype(dtype)) * row_loss.logit_scale
    if row_loss.softcap is not None:
        y = row_loss.softcap * torch.tanh(y / row_loss.softcap)

    flat = target.reshape(-1)
    counted = flat != ignore_index
    lse = torch.logsumexp(y, dim=1)
    at_target = y.gather(1, flat.where(counted, 0)[:, None]).squeeze(1)
    loss = lse - (1 - row_loss.label_smoothing) * at_target
    if row_loss.label_smoothing:
        loss = loss - row_loss.label_smoothing * y.mean(1)
    if row_loss.z_loss:
        loss = loss + row_loss.z_loss * lse.square()
    loss = loss.where(counted, 0.0)
    if reduction == "none":
        return loss.reshape(target.shape)
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / mean_divisor(counted.sum() if num_items is None else num_items, loss)


def mean_divisor(count: Tensor | int, like: Tensor) -> Tensor:
    """``count`` as a tensor with the dtype and device of ``like``."""
    if isinstance(count, Tensor):
        return count.to(like.device, like.dtype)
    # filled on the device, because the host would wait for a copy
    return like.new_full((), count)
