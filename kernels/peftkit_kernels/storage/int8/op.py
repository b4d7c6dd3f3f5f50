"""The public functions: checks and choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.core.dispatch import Backend
from peftkit_kernels.storage.by_rows import dequantize
from peftkit_kernels.storage.int8.reference import (
    dequantize_int8_reference,
    quantize_rows_reference,
)
from peftkit_kernels.storage.int8.torch_impl import dequantize_into
from peftkit_kernels.storage.int8.triton_impl import dequantize_triton
from peftkit_kernels.storage.int8.weight import Int8Weight


def quantize_int8(weight: Tensor) -> Int8Weight:
    """Store a linear's weight in eight bits with one scale for each output row, as bitsandbytes does (its ``CB`` and ``SCB``).

    Args:
        weight: ``[N, K]``, float32 or a 16-bit dtype.

    Raises:
        ValueError: The weight is not a floating-point matrix.

    Source: Dettmers et al., 2022, arXiv:2208.07339, section 3.
    """
    if not weight.is_floating_point() or weight.dim() != 2:
        raise ValueError(
            f"weight is {weight.dtype} {tuple(weight.shape)}; pass a floating-point [N, K]"
        )
    codes, absmax = quantize_rows_reference(weight.detach())
    return Int8Weight(codes, absmax.float())


def dequantize_int8(
    q: Int8Weight,
    dtype: torch.dtype = torch.float32,
    *,
    out: Tensor | None = None,
    row_scale: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The weight stored by ``quantize_int8``: ``codes · (row_absmax / 127 (· row_scale))`` in float32, rounded once.

    Args:
        q: The weight.
        dtype: The dtype of the result if ``out`` is ``None``.
        out: ``[N, K]`` to write to, in any floating-point dtype.
        row_scale: ``Float32[N]``, a factor on each row.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``out``, or a new ``[N, K]`` of ``dtype``. All backends give the same bits.

    Raises:
        ValueError: ``out`` or ``row_scale`` do not fit, the dtype is not floating point, or the backend cannot run.
    """
    return dequantize(
        "dequantize_int8",
        *(q, dtype, out, row_scale, backend),
        reference=dequantize_int8_reference,
        by_torch=dequantize_into,
        by_triton=dequantize_triton,
    )
