"""What ops on quantised weights share: one name for both storages, and decoding by whichever it is."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels import int8, nf4, workspace
from peftkit_kernels.int8 import Int8Weight
from peftkit_kernels.nf4 import NF4Weight

QuantizedWeight = NF4Weight | Int8Weight


def dequantize_reference(
    q: QuantizedWeight, dtype: torch.dtype, row_scale: Tensor | None = None
) -> Tensor:
    """``[N, K]``: the weight as its storage defines it, by plain torch ops."""
    if isinstance(q, NF4Weight):
        return nf4.dequantize_nf4_reference(q, dtype, row_scale)
    return int8.dequantize_int8_reference(q, dtype, row_scale)


def decode(q: QuantizedWeight, dtype: torch.dtype, row_scale: Tensor | None = None) -> Tensor:
    """The same in the workspace of this thread: to be used up before the next call, never saved."""
    out = workspace.take(q.shape, dtype, q.device)
    if isinstance(q, NF4Weight):
        return nf4.dequantize_nf4(q, out=out, row_scale=row_scale, backend="torch")
    return int8.dequantize_int8(q, out=out, row_scale=row_scale, backend="torch")


def check_quantized(x: Tensor, q: QuantizedWeight, kind: type, name: str = "q") -> None:
    """Raise ``ValueError`` unless ``q`` is a ``kind`` with the shape ``(N, K)`` of a linear for ``x [..., K]``."""
    if not isinstance(q, kind):
        raise ValueError(f"{name} is a {type(q).__name__}; this op takes {kind.__name__}")
    if len(q.shape) != 2 or x.dim() < 1 or x.shape[-1] != q.shape[1]:
        raise ValueError(
            f"{name} has shape {tuple(q.shape)} and x {tuple(x.shape)}; {name} must be (N, K) for x [..., K]"
        )
