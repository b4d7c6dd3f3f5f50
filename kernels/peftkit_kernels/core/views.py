"""Recognise tensors that are consecutive parts of one buffer, so that one operation can act on all of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def as_one_view(tensors: Sequence[Tensor], dim: int) -> Tensor | None:
    """One view that covers all tensors, if they are consecutive parts of one tensor along ``dim``; otherwise ``None``.

    Args:
        tensors: At least one.
        dim: The axis along which the parts follow each other. All other sizes are equal.
    """
    first = tensors[0]
    storage, stride = first.untyped_storage()._cdata, first.stride()
    others = [size for axis, size in enumerate(first.shape) if axis != dim]
    total = 0
    for t in tensors:
        if (
            t.untyped_storage()._cdata != storage
            or t.dtype is not first.dtype
            or t.stride() != stride
            or t.storage_offset() != first.storage_offset() + total * stride[dim]
            or [size for axis, size in enumerate(t.shape) if axis != dim] != others
        ):
            return None
        total += t.shape[dim]
    shape = [total if axis == dim else size for axis, size in enumerate(first.shape)]
    return first.as_strided(shape, stride, first.storage_offset())
