"""Where the parameters of a new adapter go, and in which dtype."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn


def device_and_dtype(module: nn.Module, model: Any) -> tuple[torch.device, torch.dtype]:
    """The device of a module and the dtype its model computes in (a quantised weight has none that could be trained)."""
    tensors = list(itertools.chain(module.parameters(), module.buffers(), model.parameters()))
    dtype = getattr(model, "dtype", None)
    if dtype is None or not dtype.is_floating_point:
        dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    return tensors[0].device, dtype
