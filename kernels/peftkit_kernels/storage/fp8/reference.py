"""The definition of float8 storage by rows."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.storage.fp8.weight import DTYPE, LARGEST, Float8Weight

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""A row of zeros, or of numbers too small for a normal scale, has this scale: its reciprocal is finite."""


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x · (1 / scale)``, rounded to float8, and the scale of each row: its largest magnitude divided by 448, in float32.

    A value that is not finite gives its row a scale that is not finite, and no other row.

    Args:
        x: ``[M, K]``, any floating-point dtype.

    Returns:
        ``Float8_e4m3fn[M, K]`` and ``Float32[M]``.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    absmax = wide.abs().amax(1) if x.shape[1] else wide.new_zeros(x.shape[0])
    scale = (absmax.float() / LARGEST).clamp_min(SMALLEST_SCALE)
    return (wide * scale.reciprocal()[:, None]).to(DTYPE), scale


def dequantize_fp8_reference(
    q: Float8Weight, dtype: torch.dtype = torch.float32, row_scale: Tensor | None = None
) -> Tensor:
    """``codes · (q.row_scale (· row_scale))`` in float32, rounded once to ``dtype``; ``[N, K]``."""
    scale = q.row_scale if row_scale is None else q.row_scale * row_scale
    return (q.codes.float() * scale[:, None]).to(dtype)
