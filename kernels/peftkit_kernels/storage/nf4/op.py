"""The public functions: checks and choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.core.dispatch import Backend, choose_backend
from peftkit_kernels.storage.nf4.reference import (
    assemble,
    dequantize_nf4_reference,
    quantize_nf4_reference,
)
from peftkit_kernels.storage.nf4.torch_impl import dequantize_into
from peftkit_kernels.storage.nf4.triton_impl import dequantize_triton, quantize_triton
from peftkit_kernels.storage.nf4.weight import NF4Weight, check_blocksize
from peftkit_kernels.storage.target import decode_target


def quantize_nf4(
    weight: Tensor, blocksize: int = 64, *, nested: bool = False, backend: Backend = "auto"
) -> NF4Weight:
    """Store a weight with four bits for each element, bit for bit as bitsandbytes does.

    Args:
        weight: Any shape, float32 or a 16-bit dtype.
        blocksize: Elements that share one maximum; a power of two from 32 to 4096.
        nested: Whether the maxima are also stored in 8 bits: a weight then takes 4.127 bits instead of 4.5 with blocks of 64.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``. All give the same bits; the last two run the same code.

    Raises:
        ValueError: The weight is not floating point, the block size is unknown, or the backend cannot run.

    Source: Dettmers et al., 2023, arXiv:2305.14314, section 3.
    """
    check_blocksize(blocksize)
    if not weight.is_floating_point():
        raise ValueError(f"weight is {weight.dtype}; pass a floating-point weight")
    weight = weight.detach()
    if choose_backend("quantize_nf4", backend, weight, has_dot=False) != "triton":
        return quantize_nf4_reference(weight, blocksize, nested)
    packed, absmax = quantize_triton(weight, blocksize)
    return assemble(packed, absmax, tuple(weight.shape), blocksize, nested)


def dequantize_nf4(
    q: NF4Weight,
    dtype: torch.dtype = torch.float32,
    *,
    out: Tensor | None = None,
    row_scale: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The weight stored by ``quantize_nf4``: ``LEVELS[code] · absmax (· row_scale)`` in float32, rounded once.

    Args:
        q: The weight.
        dtype: The dtype of the result if ``out`` is ``None``.
        out: ``[*q.shape]`` to write to, in any floating-point dtype and with any strides.
        row_scale: ``Float32[N]``, a factor on each row.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``out``, or a new ``[*q.shape]`` of ``dtype``. All backends give the same bits.

    Raises:
        ValueError: ``out`` or ``row_scale`` do not fit, the dtype is not floating point, or the backend cannot run.
    """
    shape = tuple(q.shape)
    result = decode_target(shape, q.device, dtype, out, row_scale)
    stored = q.tensors()
    chosen = choose_backend("dequantize_nf4", backend, result, *stored, has_dot=False)
    if chosen == "reference":
        values = dequantize_nf4_reference(q, result.dtype, row_scale)
        return values if out is None else out.copy_(values)
    matrix = result
    # the passes write matrices with contiguous rows; other layouts are filled by a copy
    if len(shape) != 2 or result.stride(1) != 1:
        rows = shape[0] if shape else 1
        matrix = result.new_empty(rows, torch.Size(shape[1:]).numel())
    if chosen == "triton":
        scale = None if row_scale is None else row_scale.detach()
        dequantize_triton(stored, [*q.layout()[:2], *matrix.shape], scale, matrix)
    else:
        flat = NF4Weight(q.packed, q.absmax, tuple(matrix.shape), q.blocksize, q.nested)
        dequantize_into(flat, matrix, row_scale)
    return result if matrix is result else result.copy_(matrix.view(shape))
