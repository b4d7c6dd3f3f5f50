"""Merge, quantise and decode on a GPU: torch operations around the Triton kernels of the two storages."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.low_rank import passes
from peftkit_kernels.storage.int8 import Int8Weight
from peftkit_kernels.storage.int8 import triton_impl as int8
from peftkit_kernels.storage.int8.reference import quantize_rows_reference
from peftkit_kernels.storage.nf4 import NF4Weight
from peftkit_kernels.storage.nf4 import triton_impl as nf4
from peftkit_kernels.storage.requantized.reference import base_reference, nest, nested_code
from peftkit_kernels.storage.requantized.weight import RequantizedWeight


def requantize_into(q: RequantizedWeight, out: Tensor, row_scale: Tensor | None) -> Tensor:
    """``requantize_reference`` with the kernels of the storages, written to ``out [N, K]``.

    The kernel of the update sums in another order than a library, so an element in the middle between two levels may get the other one.
    """
    merged = _merged(q)
    if q.into == "int8":
        codes, absmax = quantize_rows_reference(merged.to(torch.float16))
        return int8.dequantize_into(Int8Weight(codes, absmax.float()), out, row_scale)
    packed, absmax = nf4.quantize(merged, q.blocksize)
    found, nested = nested_code(q), None
    if found is not None:
        absmax, nested = nest(absmax, *found, by_table=False)
    return nf4.dequantize_into(
        NF4Weight(packed, absmax, q.shape, q.blocksize, nested), out, row_scale
    )


def _merged(q: RequantizedWeight) -> Tensor:
    """``W + scale · (B A)``, ``Float32[N, K]``, as ``merged_reference``; the update in float32 whatever precision torch may use."""
    if isinstance(q.base, NF4Weight):
        merged = nf4.dequantize_into(q.base, q.A.new_empty(q.shape, dtype=torch.float32), None)
    else:
        merged = base_reference(q)
    A, B = (factor.to(torch.float32) for factor in (q.A, q.B))
    merged = merged + passes.expand(B, A.t(), q.scale, dtype=torch.float32)
    if isinstance(q.base, Tensor) and q.base.dtype.itemsize == 2:
        merged = merged.to(q.base.dtype).float()
    return merged
