"""The public function: checks, autocast, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.core.checks import autocast_dtype, check_bias, check_lora, check_weight
from peftkit_kernels.core.dispatch import Backend, choose_backend
from peftkit_kernels.core.schedule import replays
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.lora_linear.reference import lora_linear_reference
from peftkit_kernels.ops.lora_linear.schedule import Linear, Linears, linears


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: LoRA, *, backend: Backend = "auto"
) -> Tensor:
    """A frozen linear with a low-rank update: ``y = x Wᵀ + bias + scale · drop(x) Aᵀ Bᵀ``.

    Kept for backward: ``x`` if A is trained and ``s = drop(x) Aᵀ`` (``[M, R]``) if B is trained. The mask is recomputed from
    its seed. Under autocast ``x`` and the weight are first cast to autocast's dtype, as in ``nn.Linear``; the factors keep
    their dtype.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]``, frozen, any strides (``Conv1D`` passes its transpose).
        bias: ``[N]`` or ``None``.
        lora: The adapter. It is computed in ``low_rank.adapter_dtype``: in float32 for float32 factors on a 16-bit ``x``.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``[..., N]`` in the dtype of ``x``, or of autocast if it is on.

    Raises:
        ValueError: Shapes or dtypes do not fit, the weight requires a gradient, or the backend cannot run.

    Source: Hu et al., 2021, arXiv:2106.09685.
    """
    call = Linears(x, [Linear(weight, bias, lora)])
    if backend == "auto" and replays(x):
        found = linears.again(call)
        if found is not None:
            return found[0]
    dtype = autocast_dtype(x)
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            return lora_linear(x.to(dtype), weight, bias, lora, backend=backend)
    check_weight(x, weight, "weight")
    check_bias(bias, weight, "bias")
    check_lora(lora, weight, "lora")
    chosen = choose_backend(
        "lora_linear", backend, x, weight, bias, lora.A, lora.B, rank=lora.A.shape[0]
    )
    if chosen == "reference":
        return lora_linear_reference(x, weight, bias, lora)
    return linears(chosen, call)[0]
