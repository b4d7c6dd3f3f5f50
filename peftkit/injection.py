"""Shared by prefixes and bottlenecks: the device and dtype of new parameters, and the check for unsupported config fields."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn


def device_and_dtype(module: nn.Module, model: Any) -> tuple[torch.device, torch.dtype]:
    """The device of ``module`` and the dtype that ``model`` computes in.

    The dtype of the module's weight is not used, because a quantised weight has an integer dtype, which cannot be trained.
    """
    tensors = list(itertools.chain(module.parameters(), module.buffers(), model.parameters()))
    dtype = getattr(model, "dtype", None)
    if dtype is None or not dtype.is_floating_point:
        floating = (t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1)
        dtype = next(floating, torch.float32)
    return tensors[0].device, dtype


def refuse_peft_fields(config: Any) -> None:
    """Raise an error if a config sets a field that only ``peftkit.wrap`` supports.

    Raises:
        ValueError: ``exclude_modules`` or ``modules_to_save`` is set, or ``target_modules`` is a pattern.
    """
    fields = [name for name in ("exclude_modules", "modules_to_save") if getattr(config, name)]
    if isinstance(config.target_modules, str):
        fields.append("target_modules")
    if fields:
        name = fields[0]
        raise ValueError(
            f"{name}={getattr(config, name)!r} is only supported by peftkit.wrap; here, list the modules in target_modules"
        )
