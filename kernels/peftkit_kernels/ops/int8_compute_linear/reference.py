"""The definition of ``int8_compute_linear``."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.lora_linear.reference import lora_linear_reference
from peftkit_kernels.storage.int8 import Int8ComputeWeight, Int8Weight


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
    weight = Int8ComputeWeight(*q.tensors(), threshold, backward_in_8_bits=True)
    return lora_linear_reference(x, weight, bias, lora, compute_dtype=compute_dtype)
