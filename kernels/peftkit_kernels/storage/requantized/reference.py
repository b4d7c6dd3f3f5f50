"""The definition: what bitsandbytes stores after a merge."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from peftkit_kernels.storage.int8 import Int8Weight
from peftkit_kernels.storage.int8.reference import (
    dequantize_int8_reference,
    quantize_rows_reference,
)
from peftkit_kernels.storage.nf4 import NestedAbsmax, NF4Weight
from peftkit_kernels.storage.nf4.reference import dequantize_nf4_reference, quantize_nf4_reference
from peftkit_kernels.storage.nf4.weight import midpoints
from peftkit_kernels.storage.requantized.weight import RequantizedWeight

_STEP = 7.874015718698502e-3
"""1 / 127 as bitsandbytes writes it."""
_TABLE = 65_535
"""The last index of the table in which bitsandbytes finds the codes of nested maxima on the CPU."""


def requantize_reference(
    q: RequantizedWeight, dtype: torch.dtype, row_scale: Tensor | None = None
) -> Tensor:
    """The decoded values of ``requantize(q)``, ``[N, K]``."""
    stored = requantize(q)
    decode = (
        dequantize_nf4_reference if isinstance(stored, NF4Weight) else dequantize_int8_reference
    )
    return decode(stored, dtype, row_scale)  # pyright: ignore[reportArgumentType]


def requantize(q: RequantizedWeight) -> NF4Weight | Int8Weight:
    """The merged weight as bitsandbytes stores it. bitsandbytes rounds a weight to float16 before it stores it in 8 bits."""
    merged = merged_reference(q)
    if q.into == "int8":
        codes, absmax = quantize_rows_reference(merged.to(torch.float16))
        return Int8Weight(codes, absmax.float())
    plain = quantize_nf4_reference(merged, q.blocksize)
    found = nested_code(q)
    if found is None:
        return plain
    codes, nested = nest(plain.absmax, *found, by_table=plain.absmax.is_cpu)
    return NF4Weight(plain.packed, codes, q.shape, q.blocksize, nested)


def merged_reference(q: RequantizedWeight) -> Tensor:
    """``W + scale · (B A)``, ``Float32[N, K]``: product, scale and sum are each rounded, as in PEFT's merge.

    The sum is rounded to the dtype of a 16-bit base, in which a merge stores it before it is quantised.
    """
    update = torch.mm(q.B.float(), q.A.float()) * q.scale
    merged = base_reference(q) + update
    if isinstance(q.base, Tensor) and q.base.dtype.itemsize == 2:
        merged = merged.to(q.base.dtype).float()
    return merged


def base_reference(q: RequantizedWeight) -> Tensor:
    """The base, ``Float32[N, K]``. Codes of 8 bits are decoded in the order of bitsandbytes, as a merge reads them."""
    if isinstance(q.base, NF4Weight):
        return dequantize_nf4_reference(q.base)
    if isinstance(q.base, Int8Weight):
        return q.base.codes.float() * q.base.row_absmax[:, None] * _STEP
    return q.base.float()


def nested_code(q: RequantizedWeight) -> tuple[Tensor, int] | None:
    """The code of nested block maxima and the size of their blocks, those of the base; ``None`` if maxima are not nested."""
    if not isinstance(q.base, NF4Weight) or q.base.nested is None:
        return None
    return q.base.nested.code, q.base.nested.blocksize


def nest(
    maxima: Tensor, code: Tensor, blocksize: int, *, by_table: bool
) -> tuple[Tensor, NestedAbsmax]:
    """Block maxima in 8 bits.

    Args:
        maxima: ``Float32[blocks]``.
        code: ``Float32[256]``, ascending.
        blocksize: Maxima that share one ``absmax``.
        by_table: Round a value to one of 65,536 before its nearest code is found, as bitsandbytes does on the CPU.

    Returns:
        ``UInt8[blocks]``, and what decodes them.
    """
    offset = maxima.mean()
    values, blocks = maxima - offset, -(-maxima.numel() // blocksize)
    padded = torch.nn.functional.pad(values, (0, blocks * blocksize - values.numel()))
    rows = padded.view(blocks, blocksize)
    absmax = rows.abs().amax(1)
    # a block of equal maxima has no reciprocal; all its codes stand for 0
    inverse = torch.where(absmax == 0, absmax, absmax.reciprocal())
    scaled = (rows * inverse[:, None]).clamp(-1, 1).view(-1)[: values.numel()]
    if by_table:
        index = ((scaled + 1) * 0.5 * _TABLE + 0.5).int()
        codes = _codes_of_table(code)[index]
    else:
        codes = torch.bucketize(scaled, midpoints(code)).to(torch.uint8)
    return codes, NestedAbsmax(code, absmax, offset, blocksize)


def _codes_of_table(code: Tensor) -> Tensor:
    return _table(tuple(code.tolist()))


@functools.lru_cache(8)
def _table(code: tuple[float, ...]) -> Tensor:
    """``UInt8[65536]``: the nearest code of each value of bitsandbytes' table over [-1, 1]."""
    values = torch.arange(_TABLE + 1) / _TABLE * 2 - 1
    return torch.bucketize(values, midpoints(torch.tensor(code))).to(torch.uint8)
