"""Frozen weights of any kind of storage: which kind a weight has, its decoded values, and its form as the arguments of an op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core import workspace
from peftkit_kernels.storage.int8 import Int8Weight
from peftkit_kernels.storage.int8.kind import INT8
from peftkit_kernels.storage.kind import Kind
from peftkit_kernels.storage.nf4 import NF4Weight
from peftkit_kernels.storage.nf4.kind import NF4

QuantizedWeight = NF4Weight | Int8Weight
KINDS = (NF4, INT8)
"""All kinds. Their numbers are part of what ``layout_of`` returns."""


def kind_of(q: Any) -> Kind:
    """The kind of a weight.

    Raises:
        TypeError: It is of no known kind.
    """
    for kind in KINDS:
        if type(q) is kind.weight:
            return kind
    known = ", ".join(kind.weight.__name__ for kind in KINDS)
    raise TypeError(
        f"q is a {type(q).__name__}; the kinds of storage that the ops decode are {known}"
    )


def dequantize_reference(
    q: QuantizedWeight, dtype: torch.dtype, row_scale: Tensor | None = None
) -> Tensor:
    """The decoded weight, ``[N, K]``, by the definition of its storage in plain torch ops."""
    return kind_of(q).reference(q, dtype, row_scale)


def decode(q: QuantizedWeight, dtype: torch.dtype, row_scale: Tensor | None = None) -> Tensor:
    """The decoded weight, ``[N, K]``, in the workspace of this thread: valid until the next call, so never save it."""
    kind = kind_of(q)
    return kind.decode(q, workspace.take(q.shape, dtype, q.device), row_scale)


def decode_triton(
    q: QuantizedWeight, dtype: torch.dtype, row_scale: Tensor | None = None
) -> Tensor:
    """``decode`` by a Triton kernel."""
    kind = kind_of(q)
    return kind.decode_triton(q, workspace.take(q.shape, dtype, q.device), row_scale)


def layout_of(q: QuantizedWeight) -> list[int]:
    """The numbers that an op takes besides ``q.tensors()``: that of its kind, and its layout. The last two are ``N`` and ``K``."""
    kind = kind_of(q)
    return [KINDS.index(kind), *kind.layout(q)]


def rebuild(tensors: Sequence[Tensor], layout: Sequence[int]) -> QuantizedWeight:
    """The weight, from its ``tensors()`` and ``layout_of``."""
    number, *own = layout
    return KINDS[number].rebuild(tensors, own)


def check_quantized(x: Tensor, q: QuantizedWeight, kind: type, name: str = "q") -> None:
    """Raise ``ValueError`` unless ``q`` is a ``kind`` with the shape ``(N, K)`` of a linear for ``x [..., K]``."""
    if not isinstance(q, kind):
        raise ValueError(f"{name} is a {type(q).__name__}; it must be of type {kind.__name__}")
    if len(q.shape) != 2 or x.dim() < 1 or x.shape[-1] != q.shape[1]:
        raise ValueError(
            f"{name} has shape {tuple(q.shape)} and x {tuple(x.shape)}; {name} must be (N, K) for x [..., K]"
        )
