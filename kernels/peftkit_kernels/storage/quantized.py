"""Helpers for ops on quantised weights, the same for NF4 and 8-bit storage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkit_kernels.core import workspace
from peftkit_kernels.storage import int8, nf4
from peftkit_kernels.storage.int8 import Int8Weight
from peftkit_kernels.storage.int8 import triton_impl as int8_triton
from peftkit_kernels.storage.nf4 import NF4Weight
from peftkit_kernels.storage.nf4 import triton_impl as nf4_triton

QuantizedWeight = NF4Weight | Int8Weight


def dequantize_reference(
    q: QuantizedWeight, dtype: torch.dtype, row_scale: Tensor | None = None
) -> Tensor:
    """The decoded weight, ``[N, K]``, by the definition of its storage in plain torch ops."""
    if isinstance(q, NF4Weight):
        return nf4.dequantize_nf4_reference(q, dtype, row_scale)
    return int8.dequantize_int8_reference(q, dtype, row_scale)


def decode(q: QuantizedWeight, dtype: torch.dtype, row_scale: Tensor | None = None) -> Tensor:
    """The decoded weight, ``[N, K]``, in the workspace of this thread: valid until the next call, so never save it."""
    out = workspace.take(q.shape, dtype, q.device)
    if isinstance(q, NF4Weight):
        return nf4.dequantize_nf4(q, out=out, row_scale=row_scale, backend="torch")
    return int8.dequantize_int8(q, out=out, row_scale=row_scale, backend="torch")


def decode_triton(
    q: QuantizedWeight, dtype: torch.dtype, row_scale: Tensor | None = None
) -> Tensor:
    """``decode`` by a Triton kernel."""
    out = workspace.take(q.shape, dtype, q.device)
    if isinstance(q, NF4Weight):
        return nf4_triton.dequantize_into(q, out, row_scale)
    return int8_triton.dequantize_into(q, out, row_scale)


def layout_of(q: QuantizedWeight) -> list[int]:
    """The numbers that a torch.library op takes besides ``q.tensors()``.

    Never empty: torch.library would treat an empty list as a list of tensors.
    """
    return q.layout() if isinstance(q, NF4Weight) else list(q.shape)


def rebuild(tensors: Sequence[Tensor], layout: Sequence[int]) -> QuantizedWeight:
    """The weight, from its ``tensors()`` and ``layout_of``."""
    if tensors[0].dtype is torch.int8:
        return Int8Weight(*tensors)
    return NF4Weight.rebuild(tensors, layout)


def check_quantized(x: Tensor, q: QuantizedWeight, kind: type, name: str = "q") -> None:
    """Raise ``ValueError`` unless ``q`` is a ``kind`` with the shape ``(N, K)`` of a linear for ``x [..., K]``."""
    if not isinstance(q, kind):
        raise ValueError(f"{name} is a {type(q).__name__}; it must be of type {kind.__name__}")
    if len(q.shape) != 2 or x.dim() < 1 or x.shape[-1] != q.shape[1]:
        raise ValueError(
            f"{name} has shape {tuple(q.shape)} and x {tuple(x.shape)}; {name} must be (N, K) for x [..., K]"
        )
