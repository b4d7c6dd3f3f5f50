"""The definitions of the frozen norms, with the roundings of the transformers modules that they replace."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, round_first: bool = True
) -> Tensor:
    """``y = x · rsqrt(mean(x²) + eps) · (offset + weight)`` over the last axis, statistics in float32 or wider.

    Args:
        x: ``[..., K]``.
        weight: ``[K]``.
        eps: Added to the mean square.
        offset: 0 for Llama's norm, 1 for Gemma's.
        round_first: Whether the normalised value is rounded to the dtype of ``x`` before it is multiplied with the weight
            (Llama) or only at the end (Gemma).
    """
    wide = x.to(_wide(x))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if round_first:
        return (offset + weight if offset else weight) * normed.to(x.dtype)
    return (normed * (offset + weight.to(wide.dtype))).to(x.dtype)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """``y = (x - mean(x)) / sqrt(var(x) + eps) · weight + bias`` over the last axis."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
