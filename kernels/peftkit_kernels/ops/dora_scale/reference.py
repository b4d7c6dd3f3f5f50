"""The definitions of ``dora_scale`` and ``dora_gate``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peftkit_kernels.ops.lora_swiglu_mlp.activation import activate


class Scale(NamedTuple):
    """The vectors that turn ``z [..., N]`` into the output of one DoRA linear.

    Attributes:
        magnitude: ``[N]``, or ``None`` if the linear has none.
        norm: ``Float[N]``, the result of ``dora_norm``; ``None`` without a magnitude.
        bias: ``[N]`` or ``None``.
    """

    magnitude: Tensor | None
    norm: Tensor | None
    bias: Tensor | None


def dora_scale_reference(
    z: Tensor, scale: Scale, *, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """``y = z ∘ magnitude / norm + bias`` with one rounding; arguments and result as ``dora_scale``."""
    dtype = compute_dtype or z.dtype
    y = z.to(dtype)
    if scale.magnitude is not None and scale.norm is not None:
        wide = torch.promote_types(dtype, scale.norm.dtype)
        y = y * (scale.magnitude.to(wide) / scale.norm.to(wide))
    if scale.bias is not None:
        y = y + scale.bias.to(y.dtype)
    return y.to(dtype)


def dora_gate_reference(
    zs: tuple[Tensor, Tensor],
    scales: tuple[Scale, Scale],
    act: str,
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """``h = act(gate) ∘ up`` of the two scaled outputs; arguments and result as ``dora_gate``."""
    gate, up = (
        dora_scale_reference(z, scale, compute_dtype=compute_dtype)
        for z, scale in zip(zs, scales, strict=True)
    )
    return activate(gate, act) * up
