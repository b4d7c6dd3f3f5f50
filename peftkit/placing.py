"""What adding an adapter without PEFT needs: where its parameters go, in which dtype, and what is left to PEFT."""

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


def refuse_peft_fields(config: Any) -> None:
    """Raise where a config asks for what only PEFT's injection does.

    Raises:
        ValueError: It does.
    """
    asked = [name for name in ("exclude_modules", "modules_to_save") if getattr(config, name)]
    pattern = [] if not isinstance(config.target_modules, str) else ["target_modules"]
    for name in (*asked, *pattern):
        raise ValueError(
            f"{name}={getattr(config, name)!r} is only understood by peftkit.wrap; here, list the modules in target_modules"
        )
