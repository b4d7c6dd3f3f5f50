"""The definition of NF4 storage."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.storage.nf4.weight import (
    SMALLEST_ABSMAX,
    NestedAbsmax,
    NF4Weight,
    dynamic_code,
    level_table,
    midpoints,
)


def quantize_nf4_reference(weight: Tensor, blocksize: int = 64, nested: bool = False) -> NF4Weight:
    """The nearest level of every element, relative to the largest magnitude of its block; as ``quantize_nf4``."""
    codes, absmax = _nearest(weight, blocksize, level_table(weight.device))
    if codes.numel() % 2:
        # 7 is the code of zero
        codes = torch.nn.functional.pad(codes, (0, 1), value=7)
    packed = codes[::2] << 4 | codes[1::2]
    return assemble(packed, absmax, tuple(weight.shape), blocksize, nested)


def assemble(
    packed: Tensor, absmax: Tensor, shape: tuple[int, ...], blocksize: int, nested: bool
) -> NF4Weight:
    """The weight with these codes and block maxima; with ``nested`` the maxima are stored in 8 bits."""
    if not nested:
        return NF4Weight(packed, absmax, shape, blocksize)
    offset, code = absmax.mean(), dynamic_code().to(packed.device)
    codes, outer = _nearest(absmax - offset, 256, code)
    return NF4Weight(packed, codes, shape, blocksize, NestedAbsmax(code, outer, offset))


def _nearest(values: Tensor, blocksize: int, code: Tensor) -> tuple[Tensor, Tensor]:
    """``UInt8[n]``, the index of the nearest entry of ``code``, and ``Float32[blocks]``, the block maxima.

    The index is the number of midpoints strictly below the value; the value is multiplied by the reciprocal of its
    block's maximum, not divided by it.
    """
    flat = values.reshape(-1).float()
    blocks = -(-flat.numel() // blocksize)
    padded = torch.nn.functional.pad(flat, (0, blocks * blocksize - flat.numel()))
    rows = padded.view(blocks, blocksize)
    absmax = rows.abs().amax(1)
    scaled = (rows * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX))[:, None]).clamp(-1, 1)
    index = torch.bucketize(scaled.view(-1)[: flat.numel()], midpoints(code))
    return index.to(torch.uint8), absmax


def dequantize_nf4_reference(
    q: NF4Weight, dtype: torch.dtype = torch.float32, row_scale: Tensor | None = None
) -> Tensor:
    """``LEVELS[code] · absmax (· row_scale)``, each product in float32, then rounded once to ``dtype``.

    Args:
        q: The weight.
        dtype: The dtype of the result.
        row_scale: ``Float32[N]``, a factor on each row of the weight.

    Returns:
        ``[*q.shape]``.
    """
    packed = q.packed.reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)
    absmax = q.block_absmax().repeat_interleave(q.blocksize)
    numel = min(absmax.numel(), codes.numel())
    values = level_table(q.device)[codes[:numel].int()] * absmax[:numel]
    values = values[: torch.Size(q.shape).numel()].view(q.shape)
    if row_scale is not None:
        values = values * row_scale.float().view(-1, *[1] * (len(q.shape) - 1))
    return values.to(dtype)
