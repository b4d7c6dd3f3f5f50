"""One buffer a thread, device and dtype, in which quantised weights are decoded just before they are multiplied with.

It grows to the largest weight it has held and is handed out again on the next call, so what it holds must be used up
before anybody asks for it again, and is never saved for backward. Other threads and other CUDA streams have their own.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_OF_THREAD = threading.local()


def take(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor, valid until the next call with this dtype and device."""
    buffers = _OF_THREAD.__dict__
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key, numel = str((device, dtype, stream)), math.prod(shape)
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < numel:
        buffers.pop(key, None)
        # made outside inference mode: a tensor made inside could not be written to outside
        with torch.inference_mode(False):
            buffer = buffers[key] = torch.empty(numel, dtype=dtype, device=device)
    return buffer[:numel].view(*shape)


def release() -> None:
    """Free the buffers of this thread, for instance after the last quantised model is gone."""
    _OF_THREAD.__dict__.clear()
