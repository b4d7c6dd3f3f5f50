"""The definition of ``int8_compute_linear``."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.core.dropout import apply_dropout
from peftkit_kernels.low_rank import LoRA, adapter_dtype
from peftkit_kernels.storage.int8 import Int8Weight
from peftkit_kernels.storage.int8.product.reference import Int8Product


def int8_compute_linear_reference(
    x: Tensor,
    q: Int8Weight,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    *,
    threshold: float | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """``y = x8 W8ᵀ · sx · sw + bias + scale · drop(x) Aᵀ Bᵀ``; arguments and result as ``int8_compute_linear``."""
    dtype = compute_dtype or x.dtype
    flat = x.to(dtype).reshape(-1, x.shape[-1])
    wide = torch.promote_types(dtype, torch.float32)
    y = Int8Product.apply(flat, q, threshold).to(wide)
    if bias is not None:
        y = y + bias.to(dtype).to(wide)
    if lora is not None:
        factors = compute_dtype or adapter_dtype(x, lora.A)
        s = apply_dropout(flat.to(factors), lora.p, lora.seed) @ lora.A.to(factors).t()
        y = y + s.to(wide) @ lora.B.to(factors).to(wide).t() * lora.scale
    return y.to(dtype).reshape(*x.shape[:-1], q.shape[0])
