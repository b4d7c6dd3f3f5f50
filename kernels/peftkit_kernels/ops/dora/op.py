"""The public functions: checks, autocast, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.core.checks import autocast_dtype, check_bias, check_lora, check_weight
from peftkit_kernels.core.dispatch import Backend, choose_backend
from peftkit_kernels.low_rank import LoRA, adapter_dtype
from peftkit_kernels.ops.dora import norm_schedule, schedule
from peftkit_kernels.ops.dora.reference import dora_linear_reference, dora_norm_reference
from peftkit_kernels.storage.quantized import Weight, check_quantized, tensors_of


@torch.no_grad()
def dora_norm(weight: Weight, lora: LoRA, *, backend: Backend = "auto") -> Tensor:
    """``|W + scale · B A|`` of every row, without forming the sum; a constant for autograd.

    Args:
        weight: ``[N, K]``, or a weight in NF4 or 8-bit storage.
        lora: The adapter.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``Float32[N]``; float64 for a float64 weight or adapter.

    Raises:
        ValueError: Shapes or dtypes do not fit, or the backend cannot run.

    Source: Liu et al., 2024, arXiv:2402.09353, section 4.3 (the norm as a constant).
    """
    if len(weight.shape) != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be [N, K]")
    check_lora(lora, weight, "lora")
    tensors = lora.A, lora.B, *tensors_of([weight])
    chosen = choose_backend("dora_norm", backend, *tensors, rank=lora.A.shape[0])
    if chosen == "reference":
        dtype = torch.promote_types(lora.A.dtype, torch.float32)
        if isinstance(weight, Tensor):
            dtype = torch.promote_types(dtype, weight.dtype)
        return dora_norm_reference(weight, lora, compute_dtype=dtype)
    call = norm_schedule.UpdatedWeight(weight, lora.A, lora.B, lora.scale)
    return norm_schedule.dora_norm(chosen, call)


def dora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora: LoRA,
    magnitude: Tensor,
    norm: Tensor | None = None,
    *,
    keep_direction: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """A DoRA linear: ``y = magnitude / norm · (x Wᵀ + scale · drop(x) Aᵀ Bᵀ) + bias`` with a frozen ``W``.

    Kept for backward: ``x`` if A is trained, ``s = drop(x) Aᵀ`` if B is trained, and the output itself if the magnitude is
    trained; in that case do not change the output in place.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]``, frozen, or a weight in NF4 or 8-bit storage.
        bias: ``[N]`` or ``None``.
        lora: The adapter. It is computed in ``low_rank.adapter_dtype``: in float32 for float32 factors on a 16-bit ``x``.
        magnitude: ``[N]``. Without ``keep_direction`` no element may be exactly 0, because the gradient of the magnitude is
            computed from the output.
        norm: The result of ``dora_norm`` for these factors, or ``None`` to compute it here.
        keep_direction: Keep ``z = x Wᵀ + scale · drop(x) Aᵀ Bᵀ`` for the gradient of the magnitude instead of the output. The
            output may then be changed in place. Factors wider than ``x`` imply it, because the output is rounded once more
            than the direction.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``[..., N]`` in the dtype of ``x``, or of autocast if it is on.

    Raises:
        ValueError: Shapes or dtypes do not fit, the weight or the norm requires a gradient, or the backend cannot run.

    Source: Liu et al., 2024, arXiv:2402.09353.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            options = {"keep_direction": keep_direction, "backend": backend}
            return dora_linear(x.to(dtype), weight, bias, lora, magnitude, norm, **options)
    if isinstance(weight, Tensor):
        check_weight(x, weight, "weight")
    else:
        check_quantized(x, weight, type(weight), "weight")
    check_bias(bias, weight, "bias")
    check_bias(magnitude, weight, "magnitude")
    check_lora(lora, weight, "lora")
    if norm is None:
        norm = dora_norm(weight, lora, backend=backend)
    check_bias(norm, weight, "norm")
    if norm.requires_grad:
        raise ValueError(
            "norm requires a gradient, but DoRA treats it as a constant; pass norm.detach()"
        )
    # with wider factors y is rounded to the dtype of x after the scaling, so (y - bias) / g would be less exact than z
    keep_direction = keep_direction or adapter_dtype(x, lora.A) is not x.dtype
    tensors = x, *tensors_of([weight]), bias, lora.A, lora.B, magnitude, norm
    chosen = choose_backend("dora_linear", backend, *tensors, rank=lora.A.shape[0])
    if chosen == "reference":
        return dora_linear_reference(x, weight, bias, lora, magnitude, norm)
    call = schedule.DoRA(x, weight, bias, lora, magnitude, norm, keep_direction)
    return schedule.dora_linear(chosen, call)
