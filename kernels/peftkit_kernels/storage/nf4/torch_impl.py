"""NF4 storage on the CPU: one native pass from the packed bytes to the weight, or torch ops if native code cannot run."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels import native
from peftkit_kernels.core.blocks import starts
from peftkit_kernels.storage.nf4.weight import NF4Weight, level_table

_CHUNK_ELEMENTS = 2**16
"""Elements that are decoded at a time before they are rounded to 16 bits: 256 KiB of float32 stay in the second-level cache."""


def dequantize_into(q: NF4Weight, out: Tensor, row_scale: Tensor | None) -> Tensor:
    """``dequantize_nf4_reference`` of a matrix, bit for bit, written to ``out``.

    Args:
        q: ``[N, K]``.
        out: ``[N, K]``; any row stride, contiguous elements within a row.
        row_scale: ``Float32[N]`` or ``None``.
    """
    rows, width = q.shape
    absmax = q.block_absmax()
    if not native.supports(absmax) or not q.packed.is_contiguous():
        return _by_torch(q, absmax, out, row_scale)
    if row_scale is not None:
        row_scale = row_scale.contiguous()
    if out.dtype is torch.float32:
        native.dequantize_nf4(q.packed, absmax, row_scale, out, q.blocksize, 0)
        return out
    step = max(1, _CHUNK_ELEMENTS // max(1, width))
    chunk = torch.empty(min(step, rows), width, dtype=torch.float32)
    for start in starts(rows, step):
        part = chunk[: min(step, rows - start)]
        native.dequantize_nf4(q.packed, absmax, row_scale, part, q.blocksize, start)
        out[start : start + step].copy_(part)
    return out


def _by_torch(q: NF4Weight, absmax: Tensor, out: Tensor, row_scale: Tensor | None) -> Tensor:
    levels = level_table(q.device)
    # the table maps a byte to both of its values, so one look-up gives two elements
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
    values = torch.nn.functional.embedding(q.packed.reshape(-1).int(), pairs).view(-1)
    numel = out.numel()
    whole = numel // q.blocksize * q.blocksize
    values[:whole].view(-1, q.blocksize).mul_(absmax[: whole // q.blocksize, None])
    if whole < numel:
        values[whole:].mul_(absmax[-1])
    values = values[:numel].view(out.shape)
    if row_scale is not None:
        values.mul_(row_scale[:, None])
    return out.copy_(values)
