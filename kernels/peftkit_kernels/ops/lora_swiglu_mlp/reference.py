"""The definition of ``lora_swiglu_mlp``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.lora_linear.reference import lora_linear_reference
from peftkit_kernels.ops.lora_swiglu_mlp.activation import activate
from peftkit_kernels.storage.quantized import Weight


def lora_swiglu_mlp_reference(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    loras: Sequence[LoRA | None],
    act: str = "silu",
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """``y = down(act(gate(x)) ∘ up(x))``, each linear as in ``lora_linear``, in the order gate, up, down."""
    gate, up, down = (
        lambda h, parts=parts: lora_linear_reference(h, *parts, compute_dtype=compute_dtype)
        for parts in zip(weights, biases, loras, strict=True)
    )
    return down(activate(gate(x), act) * up(x))
