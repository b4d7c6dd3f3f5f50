"""The public functions: checks and choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.dispatch import Backend, choose_backend
from peftkit_kernels.nf4.reference import dequantize_nf4_reference, quantize_nf4_reference
from peftkit_kernels.nf4.torch_impl import dequantize_into
from peftkit_kernels.nf4.weight import NF4Weight, check_blocksize

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def quantize_nf4(weight: Tensor, blocksize: int = 64, *, nested: bool = False) -> NF4Weight:
    """Store a weight in four bits an element, bit for bit as bitsandbytes does.

    Args:
        weight: Any shape, float32 or a 16-bit dtype.
        blocksize: Elements that share one maximum; a power of two from 32 to 4096.
        nested: Whether the maxima are stored in 8 bits themselves: 4.127 instead of 4.5 bits a weight at blocks of 64.

    Raises:
        ValueError: The weight is not floating point, or the block size is unknown.

    Source: Dettmers et al., 2023, arXiv:2305.14314, section 3.
    """
    check_blocksize(blocksize)
    if not weight.is_floating_point():
        raise ValueError(f"weight is {weight.dtype}; pass a floating-point weight")
    return quantize_nf4_reference(weight.detach(), blocksize, nested)


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
        dtype: Of the result where ``out`` is ``None``.
        out: ``[*q.shape]`` to write to, in its own dtype; rows may lie apart.
        row_scale: ``Float32[N]``, a factor on each row.
        backend: ``"auto"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``out``, or a new ``[*q.shape]`` of ``dtype``. All backends give the same bits.

    Raises:
        ValueError: ``out`` or ``row_scale`` do not fit, the dtype is not floating point, or the backend cannot run.
    """
    shape = tuple(q.shape)
    if out is not None and (tuple(out.shape) != shape or out.device != q.device):
        raise ValueError(
            f"out is {tuple(out.shape)} on {out.device}; it must be {shape} on {q.device}"
        )
    dtype = dtype if out is None else out.dtype
    if dtype not in _DTYPES:
        raise ValueError(f"{'dtype' if out is None else 'out'} is {dtype}; use one of {_DTYPES}")
    if row_scale is not None and (
        row_scale.shape != shape[:1] or row_scale.dtype is not torch.float32
    ):
        raise ValueError(
            f"row_scale is {row_scale.dtype} {tuple(row_scale.shape)}; it must be float32 {shape[:1]}"
        )
    if choose_backend("dequantize_nf4", backend) == "reference":
        values = dequantize_nf4_reference(q, dtype, row_scale)
        return values if out is None else out.copy_(values)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=q.device)
    if len(shape) == 2 and out.stride(1) == 1:
        return dequantize_into(q, out, row_scale)
    flat = (shape[0] if shape else 1, torch.Size(shape[1:]).numel())
    matrix = NF4Weight(q.packed, q.absmax, flat, q.blocksize, q.nested)
    values = dequantize_into(matrix, torch.empty(flat, dtype=dtype, device=q.device), row_scale)
    return out.copy_(values.view(shape))
