"""The definition of ``nf4_linear`` and ``int8_linear``."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.lora_linear import lora_linear_reference
from peftkit_kernels.storage.quantized import QuantizedWeight, dequantize_reference


def quantized_linear_reference(
    x: Tensor,
    q: QuantizedWeight,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """``y = x Wᵀ + bias + scale · drop(x) Aᵀ Bᵀ`` with ``W`` decoded and rounded to ``compute_dtype`` (default: of ``x``)."""
    weight = dequantize_reference(q, compute_dtype or x.dtype)
    return lora_linear_reference(x, weight, bias, lora, compute_dtype=compute_dtype)
