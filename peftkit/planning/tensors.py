"""Tensors with sizes and addresses, but without memory."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64


class _Addresses:
    """A range of addresses. The system would give a page memory only when something reads or writes it."""

    def __init__(self):
        flags = {}
        if hasattr(mmap, "MAP_PRIVATE"):
            # Linux has had this value of MAP_NORESERVE on every processor but SPARC; Python has the name since 3.13
            reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
            flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve}
        for bits in (44, 40, 36, 32):
            try:
                self._map = mmap.mmap(-1, 2**bits, **flags)
            except (OSError, ValueError, OverflowError):
                continue
            self._size, self._next = 2**bits, 0
            self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
            return
        raise OSError(
            "the system gives this process no range of 4 GiB of addresses, which a plan needs; raise the limit (ulimit -v)"
        )

    def take(self, size: int) -> int:
        """The address of ``size`` bytes; after the last one they start again."""
        rounded = -(-size // _ALIGNMENT) * _ALIGNMENT
        if self._next + rounded > self._size:
            self._next = 0
        self._next += rounded
        return self._start + self._next - rounded

    def __contains__(self, address: int) -> bool:
        return self._start <= address < self._start + self._size


@functools.cache
def _addresses() -> _Addresses:
    return _Addresses()


def has_no_values(tensor: Tensor) -> bool:
    """Whether ``tensor`` was made by an operation that was not computed, or is on the meta device."""
    return tensor.is_meta or tensor.untyped_storage().data_ptr() in _addresses()


@dataclass(frozen=True, slots=True)
class Sizes:
    """A tensor that an operation returns."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    storage_bytes: int
    storage_offset: int


def sizes_of(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage().nbytes()
    return Sizes(tuple(value.shape), value.stride(), value.dtype, storage, value.storage_offset())


def described(value: Any) -> Any:
    """What the sizes of an operation's result depend on: its arguments without the values of tensors."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(map(described, value))
    if isinstance(value, dict):
        return tuple((name, described(item)) for name, item in value.items())
    return type(value), value


def of_layout(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Sizes:
    """A tensor that fills its storage."""
    last = sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    return Sizes(shape, stride, dtype, (last + 1) * dtype.itemsize, 0)


def contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> Sizes:
    stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return Sizes(shape, stride, dtype, math.prod(shape) * dtype.itemsize, 0)


def make(sizes: Sizes, on_meta: bool) -> Tensor:
    """A tensor of these sizes, on the meta device or on the CPU."""
    return _on_meta(sizes) if on_meta else _on_cpu(sizes)


def _on_cpu(sizes: Sizes) -> Tensor:
    """A tensor on the CPU without memory."""
    address = _addresses().take(sizes.storage_bytes)
    storage = torch._C._construct_storage_from_data_pointer(
        address, torch.device("cpu"), sizes.storage_bytes
    )
    t = torch.empty(0, dtype=sizes.dtype)
    return t.set_(storage, sizes.storage_offset, sizes.shape, sizes.stride)


def _on_meta(sizes: Sizes) -> Tensor:
    return torch.empty_strided(sizes.shape, sizes.stride, dtype=sizes.dtype, device="meta")
