"""The public function: checks, autocast, choice of backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkit_kernels.core.autograd import run
from peftkit_kernels.core.checks import (
    autocast_dtype,
    check_bias,
    check_counts,
    check_lora,
    check_weight,
)
from peftkit_kernels.core.dispatch import Backend, choose_backend
from peftkit_kernels.core.op import replays
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.lora_qkv.reference import lora_qkv_reference
from peftkit_kernels.ops.lora_qkv.torch_impl import Call, LoRAQKV
from peftkit_kernels.ops.lora_qkv.triton_impl import lora_qkv_triton, without_gaps
from peftkit_kernels.storage.quantized import Weight, arguments_of


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
    if backend == "auto" and replays(x):
        ys = lora_qkv_triton.again(x, *arguments_of(weights), *without_gaps(biases, loras))
        if ys is not None:
            return tuple(ys)
    dtype = autocast_dtype(x)
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            return lora_qkv(x.to(dtype), weights, biases, loras, backend=backend)
    check_counts(weights, biases, loras)
    for i, (weight, bias, lora) in enumerate(zip(weights, biases, loras, strict=True)):
        check_weight(x, weight, f"weights[{i}]")
        check_bias(bias, weight, f"biases[{i}]")
        if lora is not None:
            check_lora(lora, weight, f"loras[{i}]")
    factors = [
        (None, None, None) if lora is None else (lora.A, lora.B, lora.numbers()) for lora in loras
    ]
    As, Bs, numbers = zip(*factors, strict=True)
    rank = max([0, *(A.shape[0] for A in As if A is not None)])
    stored, storage = arguments_of(weights)
    chosen = choose_backend("lora_qkv", backend, x, *stored, *biases, *As, *Bs, rank=rank)
    if chosen == "reference":
        return lora_qkv_reference(x, weights, biases, loras)
    if chosen == "triton":
        return tuple(lora_qkv_triton(x, stored, storage, *without_gaps(biases, loras)))
    return run(LoRAQKV, Call(numbers, storage), x, *biases, *As, *Bs, *stored)
