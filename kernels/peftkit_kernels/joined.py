"""Tensors that lie one behind the other in one buffer, so that what is done to each can be done to all of them at once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def joined(tensors: Sequence[Tensor], dim: int) -> Tensor | None:
    """The tensor of which these are the consecutive parts along ``dim``, as a view, or ``None`` where they are not.

    Args:
        tensors: At least one.
        dim: The axis along which their sizes may differ.
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
