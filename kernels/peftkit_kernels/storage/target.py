"""Where a decoded weight is written: the checks that every kind of storage makes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of decoded weights."""


def decode_target(
    shape: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    out: Tensor | None,
    row_scale: Tensor | None,
) -> Tensor:
    """``out``, or a new tensor of ``dtype``.

    Args:
        shape: The shape of the weight, ``[N, ...]``.
        device: The device of its codes.
        dtype: Ignored if there is an ``out``.
        out: The caller's tensor of this shape, in any strides.
        row_scale: The caller's factor on each row, ``Float32[N]``.

    Raises:
        ValueError: ``out`` or ``row_scale`` do not fit, or the dtype is none of ``DTYPES``.
    """
    shape = tuple(shape)
    if out is not None and (tuple(out.shape) != shape or out.device != device):
        raise ValueError(
            f"out is {tuple(out.shape)} on {out.device}; it must be {shape} on {device}"
        )
    if (dtype if out is None else out.dtype) not in DTYPES:
        name, found = ("dtype", dtype) if out is None else ("out", out.dtype)
        raise ValueError(f"{name} is {found}; use one of {DTYPES}")
    if row_scale is not None and (
        row_scale.shape != shape[:1] or row_scale.dtype is not torch.float32
    ):
        raise ValueError(
            f"row_scale is {row_scale.dtype} {tuple(row_scale.shape)}; it must be float32 {shape[:1]}"
        )
    return torch.empty(shape, dtype=dtype, device=device) if out is None else out
