"""The definition of ``lora_linear``."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.core.dropout import apply_dropout
from peftkit_kernels.low_rank import LoRA, adapter_dtype
from peftkit_kernels.storage.fp8 import Float8Weight
from peftkit_kernels.storage.fp8.product import reference as fp8
from peftkit_kernels.storage.int8 import Int8ComputeWeight
from peftkit_kernels.storage.int8.product import reference as int8
from peftkit_kernels.storage.quantized import Weight, contains_update, dense_reference


def lora_linear_reference(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora: LoRA | None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """``y = x Wᵀ + bias + scale · drop(x) Aᵀ Bᵀ``, evaluated in ``compute_dtype``.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]``; a quantised one is decoded and rounded to the dtype of the products, or multiplied as it is stored.
        bias: ``[N]`` or ``None``.
        lora: The adapter, or ``None`` for the frozen linear alone.
        compute_dtype: Dtype of every product. The default is that of ``x`` for the frozen linear and
            ``low_rank.adapter_dtype`` for the adapter; their sum is rounded once to the dtype of ``x``.

    Returns:
        ``[..., N]`` in ``compute_dtype`` or the dtype of ``x``.
    """
    dtype = compute_dtype or x.dtype
    x = x.to(dtype)
    rows = x.reshape(-1, x.shape[-1])
    is_multiplied_as_stored = isinstance(weight, (Int8ComputeWeight, Float8Weight))
    if is_multiplied_as_stored:
        product = int8 if isinstance(weight, Int8ComputeWeight) else fp8
        # its sums are rounded once, after bias and update
        y = product.product_reference(rows, weight)
        y = y if bias is None else y + bias.to(dtype).to(y.dtype)
    else:
        W = dense_reference(weight, dtype)
        if contains_update(weight) and lora is not None:
            W, lora = _straight_through(W, lora), None
        y = torch.nn.functional.linear(rows, W, None if bias is None else bias.to(dtype))
    if lora is not None:
        wide = compute_dtype or adapter_dtype(x, lora.A)
        s = apply_dropout(rows.to(wide), lora.p, lora.seed) @ lora.A.to(wide).t()
        if is_multiplied_as_stored:
            s = s.to(torch.promote_types(wide, y.dtype))
        y = y + s @ lora.B.to(wide).to(s.dtype).t() * lora.scale
    return y.to(dtype).reshape(*x.shape[:-1], y.shape[1])


def _straight_through(W: Tensor, lora: LoRA) -> Tensor:
    """``W``, with the gradients by the factors that ``W = constant + scale · B A`` has."""
    update = lora.B.to(W.dtype) @ lora.A.to(W.dtype) * lora.scale
    return W + (update - update.detach())
