"""Merge, quantise and decode in place: torch multiplies the factors, and native passes do the rest if there are any."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels import native
from peftkit_kernels.core import workspace
from peftkit_kernels.core.checks import without_autocast
from peftkit_kernels.low_rank import cast
from peftkit_kernels.storage.nf4 import NF4Weight
from peftkit_kernels.storage.requantized.reference import (
    nest,
    nested_code,
    requantize_reference,
)
from peftkit_kernels.storage.requantized.weight import RequantizedWeight


def requantize_into(q: RequantizedWeight, out: Tensor, row_scale: Tensor | None) -> Tensor:
    """``requantize_reference``, bit for bit, written to ``out [N, K]``."""
    with torch.no_grad(), without_autocast(out):
        in_place = out.dtype is torch.float32 and out.is_contiguous()
        merged = out if in_place else workspace.take(q.shape, torch.float32, q.device)
        if not native.supports(merged) or not _are_plain(q):
            return out.copy_(requantize_reference(q, torch.float32, row_scale))
        # the product of PEFT's merge, so that its bits are those of the merge
        torch.mm(cast(q.B, torch.float32), cast(q.A, torch.float32), out=merged)
        _quantize_(q, merged)
        if row_scale is not None:
            merged.mul_(row_scale[:, None])
        return out if in_place else out.copy_(merged)


def _are_plain(q: RequantizedWeight) -> bool:
    """Whether the native passes can read the tensors of the base."""
    if isinstance(q.base, NF4Weight):
        return q.base.packed.is_contiguous()
    return isinstance(q.base, Tensor) or q.base.codes.is_contiguous()


def _quantize_(q: RequantizedWeight, update: Tensor) -> None:
    """``Q(W + scale · update)``, written to ``update``."""
    base, scale, nested = q.base, q.scale, nested_code(q)
    if isinstance(base, Tensor) and (base.dtype is not torch.float32 or base.stride(1) != 1):
        if scale != 1.0:
            update.mul_(scale)
        update.add_(base)
        if base.dtype.itemsize == 2:
            update.copy_(update.to(base.dtype))
        base, scale = None, 1.0
    blocks = update.numel() // q.blocksize
    maxima = None if nested is None else update.new_empty(blocks)
    if isinstance(base, NF4Weight):
        stored = base.packed, None, base.block_absmax(), None
    elif isinstance(base, Tensor) or base is None:
        stored = None, None, None, base
    else:
        stored = None, base.codes, base.row_absmax.contiguous(), None
    rounds = None if nested is not None else q.into
    native.merge(*stored, update, maxima, q.blocksize, scale, rounds)
    if maxima is not None and nested is not None:
        codes, inner = nest(maxima, *nested, by_table=True)
        # only the decoded maxima are needed, not the codes of the weight
        absmax = inner.decode(codes)
        native.round_nf4(update, maxima, absmax, q.blocksize)
