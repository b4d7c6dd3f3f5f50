"""Frozen weights of any storage: which kind a quantised weight is, and its decoded values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core import structure, workspace
from peftkit_kernels.core.views import as_one_view
from peftkit_kernels.low_rank import cast
from peftkit_kernels.storage.fp8 import Float8Weight
from peftkit_kernels.storage.fp8.kind import FP8
from peftkit_kernels.storage.int8 import Int8Weight
from peftkit_kernels.storage.int8.kind import INT8, INT8_COMPUTE
from peftkit_kernels.storage.kind import Kind
from peftkit_kernels.storage.nf4 import NF4Weight
from peftkit_kernels.storage.nf4.kind import NF4
from peftkit_kernels.storage.requantized import RequantizedWeight
from peftkit_kernels.storage.requantized.kind import REQUANTIZED

QuantizedWeight = NF4Weight | Int8Weight | Float8Weight | RequantizedWeight
Weight = Tensor | QuantizedWeight
KINDS = (NF4, INT8, INT8_COMPUTE, FP8, REQUANTIZED)
"""All kinds."""


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


def contains_update(weight: Weight) -> bool:
    """Whether a weight contains the update of its adapter, so that an op adds none."""
    return isinstance(weight, RequantizedWeight)


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


def _register(kind: Kind) -> None:
    structure.register(
        kind.weight,
        structure.Codec(
            lambda q: (q.tensors(), (), tuple(kind.layout(q))),
            lambda tensors, _, layout: kind.rebuild(tensors, layout),
            takes_slots=False,
        ),
    )


for _kind in KINDS:
    _register(_kind)


def tensors_of(weights: Sequence[Weight]) -> list[Tensor]:
    """All tensors of which the weights consist."""
    return structure.flatten(list(weights)).tensors


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """``[N, K]`` in ``dtype``. A quantised weight is decoded into the workspace: use the result before the next call."""
    return cast(weight, dtype) if isinstance(weight, Tensor) else decode(weight, dtype)


def dense_triton(weight: Weight, dtype: torch.dtype) -> Tensor:
    """``dense`` by a Triton kernel."""
    return cast(weight, dtype) if isinstance(weight, Tensor) else decode_triton(weight, dtype)


def dense_reference(weight: Weight, dtype: torch.dtype) -> Tensor:
    """``dense`` by the definition of the weight's storage, as a new tensor."""
    return weight.to(dtype) if isinstance(weight, Tensor) else dequantize_reference(weight, dtype)


def stacked_triton(weights: Sequence[Weight], dtype: torch.dtype) -> Tensor | None:
    """Weights of one width on top of each other, ``[ΣN, K]``: a view of their common buffer, or decoded as ``dense_triton``.

    ``None`` if dense weights have no common buffer, or if only some weights are dense.
    """
    if all(isinstance(weight, Tensor) for weight in weights):
        return as_one_view([cast(weight, dtype) for weight in weights], 0)  # pyright: ignore[reportArgumentType]
    if any(isinstance(weight, Tensor) for weight in weights):
        return None
    sizes = [weight.shape[0] for weight in weights]
    out = workspace.take((sum(sizes), weights[0].shape[1]), dtype, weights[0].device)
    for weight, part in zip(weights, out.split(sizes), strict=True):
        kind_of(weight).decode_triton(weight, part, None)
    return out


def check_quantized(x: Tensor, q: QuantizedWeight, kind: type, name: str = "q") -> None:
    """Raise ``ValueError`` unless ``q`` is a ``kind`` with the shape ``(N, K)`` of a linear for ``x [..., K]``."""
    if not isinstance(q, kind):
        raise ValueError(f"{name} is a {type(q).__name__}; it must be of type {kind.__name__}")
    if len(q.shape) != 2 or x.dim() < 1 or x.shape[-1] != q.shape[1]:
        raise ValueError(
            f"{name} has shape {tuple(q.shape)} and x {tuple(x.shape)}; {name} must be (N, K) for x [..., K]"
        )
