"""The public functions: checks and choice of backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from peftkit_kernels.core import recompute
from peftkit_kernels.core.dispatch import Backend, choose_backend, is_transformed
from peftkit_kernels.core.schedule import Schedule
from peftkit_kernels.ops.frozen_norm import schedule
from peftkit_kernels.ops.frozen_norm.config import obstacle
from peftkit_kernels.ops.frozen_norm.reference import layer_norm_reference, rms_norm_reference
from peftkit_kernels.ops.frozen_norm.schedule import LayerNorm, RMSNorm


def frozen_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    round_first: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """``y = x · rsqrt(mean(x²) + eps) · (offset + weight)`` with a frozen weight. Keeps x and one number for each row.

    Args:
        x: ``[..., K]``.
        weight: ``[K]``, frozen.
        eps: Added to the mean square.
        offset: 0 for Llama's norm, 1 for Gemma's.
        round_first: Whether the normalised value is rounded to the dtype of ``x`` before it is multiplied with the weight
            (Llama) or not (Gemma).
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Raises:
        ValueError: The weight does not fit or requires a gradient, or the backend cannot run.

    Source: Zhang and Sennrich, 2019, arXiv:1910.07467.
    """
    _check(x, weight)
    chosen = _choose("frozen_rms_norm", backend, x, weight)
    if chosen == "reference":
        return rms_norm_reference(x, weight, eps, offset=offset, round_first=round_first)
    tensors = x, weight
    return _run(schedule.frozen_rms_norm, chosen, RMSNorm, tensors, eps, offset, round_first)


def frozen_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, backend: Backend = "auto"
) -> Tensor:
    """``y = (x - mean) · rsqrt(var + eps) · weight + bias`` with frozen weight and bias. Keeps x and two numbers for each row.

    Args:
        x: ``[..., K]``.
        weight: ``[K]``, frozen.
        bias: ``[K]``, frozen, or ``None``.
        eps: Added to the variance.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Raises:
        ValueError: Weight or bias do not fit or require a gradient, or the backend cannot run.

    Source: Ba et al., 2016, arXiv:1607.06450.
    """
    _check(x, weight)
    if bias is not None:
        _check(x, bias, "bias")
    chosen = _choose("frozen_layer_norm", backend, x, weight, bias)
    if chosen == "reference":
        return layer_norm_reference(x, weight, bias, eps)
    return _run(schedule.frozen_layer_norm, chosen, LayerNorm, (x, weight, bias), eps)


def _choose(
    op: str, backend: Backend, x: Tensor, *parameters: Tensor | None
) -> Literal["reference", "torch", "triton"]:
    own = obstacle(op, x.shape[-1])
    return choose_backend(op, backend, x, *parameters, has_dot=False, own_obstacle=own)


def _run(
    op: Schedule,
    chosen: Literal["torch", "triton"],
    kind: type[RMSNorm | LayerNorm],
    tensors: Sequence[Tensor | None],
    *numbers: float,
) -> Tensor:
    """The normalised rows, tagged with the function that computes them."""

    def compute(*tensors: Tensor | None) -> Tensor:
        return op(chosen, kind(*tensors, *numbers))  # pyright: ignore[reportArgumentType]

    y = compute(*tensors)
    return y if is_transformed() else recompute.tag(y, compute, *tensors)  # pyright: ignore[reportArgumentType]


def _check(x: Tensor, parameter: Tensor, name: str = "weight") -> None:
    if x.dim() < 1 or parameter.shape != x.shape[-1:]:
        raise ValueError(
            f"{name} has shape {tuple(parameter.shape)} and x {tuple(x.shape)}; {name} must be [K] for x [..., K]"
        )
    if parameter.requires_grad:
        raise ValueError(
            f"{name} requires a gradient, but a frozen norm does not compute one; freeze it or use the norm of torch.nn"
        )
