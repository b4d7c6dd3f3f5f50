"""Buffers into which quantised weights are decoded just before a product: one for each thread, stream, device and dtype.

A buffer grows to the largest weight it has held, and the next ``take`` returns the same memory. So use its content before
the next call, and never save it for backward.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from peftkit_kernels.core import recorder

_OF_THREAD = threading.local()


def take(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor, valid until the next call with this dtype and device."""
    planner = recorder.current()
    if planner is not None:
        return planner.call(_take, shape, dtype, device)
    return _take(shape, dtype, device)


def _take(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    buffers = _OF_THREAD.__dict__
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key, numel = str((device, dtype, stream)), math.prod(shape)
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < numel:
        buffers.pop(key, None)
        # created outside inference mode: a tensor created inside it could not be written to outside it
        with torch.inference_mode(False):
            buffer = buffers[key] = torch.empty(numel, dtype=dtype, device=device)
    return buffer[:numel].view(*shape)


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """A context with buffers of its own, which are freed at its end; those from before are then used again."""
    buffers = _OF_THREAD.__dict__
    before = dict(buffers)
    buffers.clear()
    try:
        yield
    finally:
        buffers.clear()
        buffers.update(before)


def release() -> None:
    """Free the buffers of this thread, for instance after the last quantised model was deleted."""
    _OF_THREAD.__dict__.clear()
