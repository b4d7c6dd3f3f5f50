"""The definition of ``lora_qkv``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.lora_linear.reference import lora_linear_reference
from peftkit_kernels.storage.quantized import Weight


def lora_qkv_reference(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    loras: Sequence[LoRA | None],
    *,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """``lora_linear`` of the same ``x``, once for each weight; arguments as ``lora_qkv``."""
    return tuple(
        lora_linear_reference(x, weight, bias, lora, compute_dtype=compute_dtype)
        for weight, bias, lora in zip(weights, biases, loras, strict=True)
    )
