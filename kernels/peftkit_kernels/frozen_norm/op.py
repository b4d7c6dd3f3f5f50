"""The public functions: checks and choice of backend."""

from __future__ import annotations

from torch import Tensor

from peftkit_kernels import remake
from peftkit_kernels.autograd import run
from peftkit_kernels.dispatch import Backend, choose_backend
from peftkit_kernels.frozen_norm.reference import layer_norm_reference, rms_norm_reference
from peftkit_kernels.frozen_norm.torch_impl import (
    FrozenLayerNorm,
    FrozenRMSNorm,
    rms_norm_forward,
)


def frozen_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    round_first: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """``y = x · rsqrt(mean(x²) + eps) · (offset + weight)`` with a frozen weight; keeps x and one number a row.

    Args:
        x: ``[..., K]``.
        weight: ``[K]``, frozen.
        eps: Added to the mean square.
        offset: 0 for Llama's norm, 1 for Gemma's.
        round_first: Round the normalised value to the dtype of ``x`` before the weight (Llama) or not (Gemma).
        backend: ``"auto"``, ``"torch"`` or ``"reference"``.

    Raises:
        ValueError: The weight does not fit or requires a gradient, or the backend cannot run.

    Source: Zhang and Sennrich, 2019, arXiv:1910.07467.
    """
    _check(x, weight)
    if choose_backend("frozen_rms_norm", backend) == "reference":
        return rms_norm_reference(x, weight, eps, offset=offset, round_first=round_first)
    y = run(FrozenRMSNorm, x, weight, eps, offset, round_first)

    def make(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm_forward(x, weight, eps, offset, round_first)[0]

    return remake.mark(y, make, x, weight)


def frozen_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, backend: Backend = "auto"
) -> Tensor:
    """``y = (x - mean) · rsqrt(var + eps) · weight + bias`` with frozen weight and bias; keeps x and two numbers a row.

    Args:
        x: ``[..., K]``.
        weight: ``[K]``, frozen.
        bias: ``[K]``, frozen, or ``None``.
        eps: Added to the variance.
        backend: ``"auto"``, ``"torch"`` or ``"reference"``.

    Raises:
        ValueError: Weight or bias do not fit or require a gradient, or the backend cannot run.

    Source: Ba et al., 2016, arXiv:1607.06450.
    """
    _check(x, weight)
    if bias is not None:
        _check(x, bias, "bias")
    if choose_backend("frozen_layer_norm", backend) == "reference":
        return layer_norm_reference(x, weight, bias, eps)
    y = run(FrozenLayerNorm, x, weight, bias, eps)

    def make(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return layer_norm_reference(x, weight, bias, eps)

    return remake.mark(y, make, x, weight, bias)


def _check(x: Tensor, parameter: Tensor, name: str = "weight") -> None:
    if x.dim() < 1 or parameter.shape != x.shape[-1:]:
        raise ValueError(
            f"{name} has shape {tuple(parameter.shape)} and x {tuple(x.shape)}; {name} must be [K] for x [..., K]"
        )
    if parameter.requires_grad:
        raise ValueError(
            f"{name} requires a gradient, and a frozen norm gives it none; freeze it or use the norm of torch.nn"
        )
