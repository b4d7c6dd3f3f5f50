"""The definitions of ``dora_norm`` and ``dora_linear``."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.core.dropout import apply_dropout
from peftkit_kernels.low_rank import LoRA, adapter_dtype
from peftkit_kernels.storage.quantized import Weight, dense_reference


def dora_norm_reference(
    weight: Weight, lora: LoRA, *, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """``|W + scale · B A|`` of every row, ``[N]`` in ``compute_dtype`` (default: float32, or float64 for float64 factors)."""
    dtype = compute_dtype or torch.promote_types(lora.A.dtype, torch.float32)
    full = dense_reference(weight, dtype)
    return torch.linalg.vector_norm(full + lora.scale * lora.B.to(dtype) @ lora.A.to(dtype), dim=1)


def dora_linear_reference(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora: LoRA,
    magnitude: Tensor,
    norm: Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """``y = magnitude / norm · (x Wᵀ + scale · drop(x) Aᵀ Bᵀ) + bias``; arguments and result as ``dora_linear``."""
    dtype = compute_dtype or x.dtype
    if norm is None:
        wide = torch.promote_types(dtype, torch.float32)
        norm = dora_norm_reference(weight, lora, compute_dtype=wide).detach()
    full = dense_reference(weight, dtype)
    flat = x.to(dtype).reshape(-1, x.shape[-1])
    factors = compute_dtype or adapter_dtype(x, lora.A)
    s = apply_dropout(flat.to(factors), lora.p, lora.seed) @ lora.A.to(factors).t()
    z = flat @ full.t() + s @ lora.B.to(factors).t() * lora.scale
    y = (magnitude.to(norm.dtype) / norm).to(factors) * z
    if bias is not None:
        y = y + bias.to(factors)
    return y.to(dtype).reshape(*x.shape[:-1], y.shape[1])
