"""Float8 storage from torch ops."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.storage.fp8.weight import Float8Weight


def dequantize_into(q: Float8Weight, out: Tensor, row_scale: Tensor | None) -> Tensor:
    """``dequantize_fp8_reference``, bit for bit, written to ``out [N, K]``."""
    scale = q.row_scale if row_scale is None else q.row_scale * row_scale
    if out.dtype is torch.float32:
        return out.copy_(q.codes).mul_(scale[:, None])
    return out.copy_(q.codes.float().mul_(scale[:, None]))
