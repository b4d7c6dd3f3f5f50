"""The public function: checks, autocast, choice of backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkit_kernels.core.checks import (
    autocast_dtype,
    check_bias,
    check_counts,
    check_lora,
    check_weight,
)
from peftkit_kernels.core.dispatch import Backend, choose_backend
from peftkit_kernels.core.schedule import replays
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.lora_linear.schedule import Linear, Linears, linears
from peftkit_kernels.ops.lora_qkv.reference import lora_qkv_reference
from peftkit_kernels.storage.quantized import Weight, tensors_of


def lora_qkv(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    loras: Sequence[LoRA | None],
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, ...]:
    """Several frozen linears of one input, each with its low-rank update: ``yᵢ = x Wᵢᵀ + biasᵢ + scaleᵢ · drop(x) Aᵢᵀ Bᵢᵀ``.

    ``x`` is kept once for all of them. Without dropout one product computes all shrinks, and one all dA's. The input gradient
    is accumulated in one buffer.

    Args:
        x: ``[..., K]``.
        weights: ``[Nᵢ, K]`` for each projection, frozen: a tensor or a quantised weight.
        biases: ``[Nᵢ]`` or ``None`` for each projection.
        loras: An adapter or ``None`` for each projection.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``[..., Nᵢ]`` for each projection.

    Raises:
        ValueError: Shapes or dtypes do not fit, a weight requires a gradient, or the backend cannot run.
    """
    check_counts(weights, biases, loras)
    call = Linears(x, list(map(Linear, weights, biases, loras)))
    if backend == "auto" and replays(x):
        ys = linears.again(call)
        if ys is not None:
            return ys
    dtype = autocast_dtype(x)
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            return lora_qkv(x.to(dtype), weights, biases, loras, backend=backend)
    for i, (weight, bias, lora) in enumerate(zip(weights, biases, loras, strict=True)):
        check_weight(x, weight, f"weights[{i}]")
        check_bias(bias, weight, f"biases[{i}]")
        if lora is not None:
            check_lora(lora, weight, f"loras[{i}]")
    factors = [t for lora in loras if lora is not None for t in (lora.A, lora.B)]
    rank = max([0, *(lora.A.shape[0] for lora in loras if lora is not None)])
    tensors = x, *tensors_of(weights), *biases, *factors
    chosen = choose_backend("lora_qkv", backend, *tensors, rank=rank)
    if chosen == "reference":
        return lora_qkv_reference(x, weights, biases, loras)
    return linears(chosen, call)
