"""The public function: checks, autocast, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.core.checks import autocast_dtype, check_bias, check_lora
from peftkit_kernels.core.dispatch import Backend, choose_backend
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.lora_linear.reference import lora_linear_reference
from peftkit_kernels.ops.lora_linear.schedule import Linear, Linears, linears
from peftkit_kernels.storage.int8 import Int8ComputeWeight, Int8Weight
from peftkit_kernels.storage.quantized import check_quantized


def int8_compute_linear(
    x: Tensor,
    q: Int8Weight,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    *,
    threshold: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """A linear that multiplies in 8 bits, with a low-rank update in full precision.

    ``y = x8 W8ᵀ · sx · sw + bias + scale · drop(x) Aᵀ Bᵀ``; the rows of ``x`` are quantised in the call:
    ``x8 = round(x / sx)``, ``sx = absmax / 127``. The gradient of ``x`` is computed in the same way from ``dy ∘ sw``; those of
    the adapter and the bias are exact. Kept for backward: the tensors that ``lora_linear`` keeps, except the weight.

    Args:
        x: ``[..., K]``.
        q: The weight ``(N, K)``; it has no gradient.
        bias: ``[N]`` or ``None``.
        lora: The adapter or ``None``. It is computed in ``low_rank.adapter_dtype``: in float32 for float32 factors on a 16-bit
            ``x``.
        threshold: Columns of ``x`` in which some magnitude reaches it are not quantised but multiplied in the dtype of ``x``,
            as in LLM.int8() (with 6.0). ``None`` quantises all columns.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``[..., N]`` in the dtype of ``x``, or of autocast if it is on.

    Raises:
        ValueError: Shapes or dtypes do not fit, the threshold is not positive, or the backend cannot run.

    Source: Dettmers et al., 2022, arXiv:2208.07339, section 3.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            return int8_compute_linear(
                x.to(dtype), q, bias, lora, threshold=threshold, backend=backend
            )
    check_quantized(x, q, Int8Weight)
    check_bias(bias, q, "bias")
    if lora is not None:
        check_lora(lora, q, "lora")
    weight = Int8ComputeWeight(*q.tensors(), threshold, backward_in_8_bits=True)
    factors = () if lora is None else (lora.A, lora.B)
    rank = 0 if lora is None else lora.A.shape[0]
    chosen = choose_backend(
        "int8_compute_linear", backend, x, *q.tensors(), bias, *factors, rank=rank
    )
    if chosen == "reference":
        return lora_linear_reference(x, weight, bias, lora)
    return linears(chosen, Linears(x, [Linear(weight, bias, lora)]))[0]
