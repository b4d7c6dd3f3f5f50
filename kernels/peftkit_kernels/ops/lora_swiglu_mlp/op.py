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
    check_frozen,
    check_lora,
    check_weight,
)
from peftkit_kernels.core.dispatch import Backend, choose_backend
from peftkit_kernels.core.op import replays
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.lora_qkv.triton_impl import without_gaps
from peftkit_kernels.ops.lora_swiglu_mlp.activation import ACTIVATIONS
from peftkit_kernels.ops.lora_swiglu_mlp.reference import lora_swiglu_mlp_reference
from peftkit_kernels.ops.lora_swiglu_mlp.torch_impl import Call, LoRASwiGLUMLP
from peftkit_kernels.ops.lora_swiglu_mlp.triton_impl import lora_swiglu_mlp_triton
from peftkit_kernels.storage.quantized import Weight, arguments_of


def lora_swiglu_mlp(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    loras: Sequence[LoRA | None],
    act: str = "silu",
    *,
    backend: Backend = "auto",
) -> Tensor:
    """A gated MLP with low-rank updates: ``y = down(act(gate(x)) ∘ up(x))``, each linear as in ``lora_linear``.

    Kept for backward: ``x``, the outputs of the gate and up projections (``[M, F]`` each) and the rank-r projections.

    Args:
        x: ``[..., D]``.
        weights: Gate ``[F, D]``, up ``[F, D]``, down ``[D, F]``, frozen: tensors or quantised weights.
        biases: One or ``None`` for each linear, in the same order.
        loras: One or ``None`` for each linear, in the same order.
        act: One of ``ACTIVATIONS``.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``[..., D]``.

    Raises:
        ValueError: Shapes or dtypes do not fit, a weight requires a gradient, ``act`` is unknown, or the backend
            cannot run.

    Source: Shazeer, 2020, arXiv:2002.05202 (gated MLPs).
    """
    if backend == "auto" and replays(x):
        y = lora_swiglu_mlp_triton.again(
            x, *arguments_of(weights), *without_gaps(biases, loras), act
        )
        if y is not None:
            return y
    if act not in ACTIVATIONS:
        raise ValueError(f"act={act!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
    dtype = autocast_dtype(x)
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            return lora_swiglu_mlp(x.to(dtype), weights, biases, loras, act, backend=backend)
    check_counts(weights, biases, loras)
    if len(weights) != 3:
        raise ValueError(
            f"there are {len(weights)} weights; a gated MLP has three: gate, up and down"
        )
    for i, name in enumerate(("gate", "up")):
        check_weight(x, weights[i], f"weights[{i}] ({name})")
    gate, up, down = weights
    if up.shape != gate.shape or len(down.shape) != 2 or down.shape[1] != gate.shape[0]:
        raise ValueError(
            f"weights: gate {tuple(gate.shape)}, up {tuple(up.shape)} and down {tuple(down.shape)} "
            "do not form an MLP; they must be [F, D], [F, D] and [D, F]"
        )
    check_frozen(down, "weights[2] (down)")
    for i, (weight, bias, lora) in enumerate(zip(weights, biases, loras, strict=True)):
        check_bias(bias, weight, f"biases[{i}]")
        if lora is not None:
            check_lora(lora, weight, f"loras[{i}]")
    factors = [
        (None, None, None) if lora is None else (lora.A, lora.B, lora.numbers()) for lora in loras
    ]
    As, Bs, numbers = zip(*factors, strict=True)
    rank = max([0, *(A.shape[0] for A in As if A is not None)])
    stored, storage = arguments_of(weights)
    tensors = x, *stored, *biases, *As, *Bs
    chosen = choose_backend("lora_swiglu_mlp", backend, *tensors, rank=rank)
    if chosen == "reference":
        return lora_swiglu_mlp_reference(x, weights, biases, loras, act)
    if chosen == "triton":
        return lora_swiglu_mlp_triton(x, stored, storage, *without_gaps(biases, loras), act)
    return run(LoRASwiGLUMLP, Call(numbers, storage, act), x, *biases, *As, *Bs, *stored)
