"""The definition of 8-bit storage by rows."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.storage.int8.weight import Int8Weight


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """``round(x · (127 / absmax))`` and the largest magnitude of each row, ties to even; rows of zeros give zeros.

    The factor is ``127 · (1 / absmax)``, each rounded: torch divides a number by a tensor in this way, and bitsandbytes uses it.

    Args:
        x: ``[M, K]``.

    Returns:
        ``Int8[M, K]`` and ``Float32[M]`` (``Float64`` for a float64 ``x``).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    absmax = wide.abs().amax(1) if x.shape[1] else wide.new_zeros(x.shape[0])
    # 127 / 0 would turn a row of zeros into NaN
    factor = torch.where(absmax == 0, torch.zeros_like(absmax), absmax.reciprocal() * 127)
    return (wide * factor[:, None]).round().clamp(-127, 127).to(torch.int8), absmax


def dequantize_int8_reference(
    q: Int8Weight, dtype: torch.dtype = torch.float32, row_scale: Tensor | None = None
) -> Tensor:
    """``codes · (row_absmax / 127 (· row_scale))`` in float32, rounded once to ``dtype``; ``[N, K]``."""
    scale = q.row_scale() if row_scale is None else q.row_scale() * row_scale
    return (q.codes.float() * scale[:, None]).to(dtype)
