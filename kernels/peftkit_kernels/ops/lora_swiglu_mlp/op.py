"""The public function: checks, autocast, choice of backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkit_kernels.core.checks import (
    autocast_dtype,
    check_bias,
    check_counts,
    check_frozen,
    check_lora,
    check_weight,
)
from peftkit_kernels.core.dispatch import Backend, choose_backend
from peftkit_kernels.core.schedule import replays
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.lora_linear.schedule import Linear
from peftkit_kernels.ops.lora_swiglu_mlp import schedule
from peftkit_kernels.ops.lora_swiglu_mlp.activation import ACTIVATIONS
from peftkit_kernels.ops.lora_swiglu_mlp.reference import lora_swiglu_mlp_reference
from peftkit_kernels.storage.quantized import Weight, tensors_of


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
    check_counts(weights, biases, loras)
    call = schedule.MLP(x, list(map(Linear, weights, biases, loras)), act)
    if backend == "auto" and replays(x):
        y = schedule.lora_swiglu_mlp.again(call)
        if y is not None:
            return y
    if act not in ACTIVATIONS:
        raise ValueError(f"act={act!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
    dtype = autocast_dtype(x)
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            return lora_swiglu_mlp(x.to(dtype), weights, biases, loras, act, backend=backend)
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
    factors = [t for lora in loras if lora is not None for t in (lora.A, lora.B)]
    rank = max([0, *(lora.A.shape[0] for lora in loras if lora is not None)])
    tensors = x, *tensors_of(weights), *biases, *factors
    chosen = choose_backend("lora_swiglu_mlp", backend, *tensors, rank=rank)
    if chosen == "reference":
        return lora_swiglu_mlp_reference(x, weights, biases, loras, act)
    return schedule.lora_swiglu_mlp(chosen, call)
