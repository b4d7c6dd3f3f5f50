"""The public functions: checks and choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.core.blocks import starts
from peftkit_kernels.core.dispatch import Backend
from peftkit_kernels.storage.by_rows import dequantize
from peftkit_kernels.storage.fp8.reference import dequantize_fp8_reference, quantize_rows_reference
from peftkit_kernels.storage.fp8.torch_impl import dequantize_into
from peftkit_kernels.storage.fp8.triton_impl import dequantize_triton
from peftkit_kernels.storage.fp8.weight import DTYPE, Float8Weight

_CHUNK = 2**20
"""Values that are quantised together, so that the float32 copies are small next to a weight: 12 MiB."""


def quantize_fp8(weight: Tensor) -> Float8Weight:
    """Store a linear's weight in float8 (e4m3) with one scale for each output row: its largest magnitude divided by 448.

    Args:
        weight: ``[N, K]``, float32 or a 16-bit dtype, on any device.

    Raises:
        ValueError: The weight is not a matrix of float32 or a wider or 16-bit dtype.

    Source: Micikevicius et al., 2022, arXiv:2209.05433.
    """
    if not weight.is_floating_point() or weight.dtype.itemsize < 2 or weight.dim() != 2:
        raise ValueError(
            f"weight is {weight.dtype} {tuple(weight.shape)}; pass [N, K] in float32 or a 16-bit dtype"
        )
    N, K = weight.shape
    codes = weight.new_empty(N, K, dtype=DTYPE, requires_grad=False)
    row_scale = weight.new_empty(N, dtype=torch.float32, requires_grad=False)
    step = max(1, _CHUNK // max(1, K))
    for first in starts(N, step):
        part = slice(first, first + step)
        codes[part], row_scale[part] = quantize_rows_reference(weight.detach()[part].float())
    return Float8Weight(codes, row_scale)


def dequantize_fp8(
    q: Float8Weight,
    dtype: torch.dtype = torch.float32,
    *,
    out: Tensor | None = None,
    row_scale: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The weight stored by ``quantize_fp8``: ``codes · (q.row_scale (· row_scale))`` in float32, rounded once.

    Args:
        q: The weight.
        dtype: The dtype of the result if ``out`` is ``None``.
        out: ``[N, K]`` to write to, in any floating-point dtype.
        row_scale: ``Float32[N]``, another factor on each row.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``out``, or a new ``[N, K]`` of ``dtype``. All backends give the same bits.

    Raises:
        ValueError: ``out`` or ``row_scale`` do not fit, the dtype is not floating point, or the backend cannot run.
    """
    return dequantize(
        "dequantize_fp8",
        *(q, dtype, out, row_scale, backend),
        reference=dequantize_fp8_reference,
        by_torch=dequantize_into,
        by_triton=dequantize_triton,
    )
