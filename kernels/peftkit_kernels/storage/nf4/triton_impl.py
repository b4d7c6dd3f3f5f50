"""NF4 storage by Triton kernels, as torch.library ops: traceable, and bit for bit the definition."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core.launch import cdiv, launch
from peftkit_kernels.core.namespace import library_name
from peftkit_kernels.storage.nf4.config import DequantizeConfig, QuantizeConfig
from peftkit_kernels.storage.nf4.weight import NF4Weight


@functools.cache
def _kernels() -> Any:
    from peftkit_kernels.storage.nf4 import kernels

    return kernels


def words_of(packed: Tensor) -> tuple[Tensor, bool]:
    """The packed codes for the kernels: 32-bit words and true if the bytes are whole aligned words, else bytes and false."""
    packed = packed.reshape(-1).contiguous()
    aligned = packed.storage_offset() % 4 == 0 and packed.data_ptr() % 4 == 0
    if aligned and packed.numel() % 4 == 0:
        return packed.view(torch.int32), True
    return packed, False


def absmax_arguments(q: NF4Weight) -> tuple[Tensor | None, ...]:
    """The tensors that ``kernels.block_absmax`` reads: the maxima and, if nested, their code, their own maxima and offset."""
    absmax = q.absmax.reshape(-1).contiguous()
    if q.nested is None:
        return absmax, None, None, None
    code, nested = q.nested.code.contiguous(), q.nested.absmax.contiguous()
    return absmax, code, nested, q.nested.offset


def absmax_constants(q: NF4Weight) -> dict[str, Any]:
    """The constants that go with ``absmax_arguments``."""
    return {
        "NESTED": q.nested is not None,
        "BLOCKSIZE": q.blocksize,
        "NESTED_BLOCK": 1 if q.nested is None else q.nested.blocksize,
    }


def dequantize_into(
    q: NF4Weight,
    out: Tensor,
    row_scale: Tensor | None,
    *,
    config: DequantizeConfig | None = None,
) -> Tensor:
    """``dequantize_nf4_reference`` of a matrix, bit for bit, written to ``out`` by one kernel, which also decodes nested maxima.

    Args:
        q: ``[N, K]``.
        out: ``[N, K]``; any row stride, contiguous elements within a row.
        row_scale: ``Float32[N]`` or ``None``.
        config: Replaces the configuration that would be chosen.
    """
    numel, (_, K) = out.numel(), out.shape
    if not numel:
        return out
    whole = K % 8 == 0
    c = config or DequantizeConfig.choose(whole=whole)
    packed, words = words_of(q.packed)
    launch(
        _kernels().dequantize_kernel,
        (cdiv(cdiv(numel, 8), c.block),),
        *(packed, *absmax_arguments(q)),
        *(None if row_scale is None else row_scale.contiguous(), out),
        *(numel, K, K // 8, out.stride(0)),
        WORDS=words,
        WHOLE=whole,
        ROWS=row_scale is not None or not out.is_contiguous(),
        HAS_SCALE=row_scale is not None,
        **absmax_constants(q),
        BLOCK=c.block,
        num_warps=c.num_warps,
        num_stages=1,
        # a nested maximum is a product and a sum, each of which must be rounded
        fp_fusion=q.nested is None,
    )
    return out


def quantize(
    weight: Tensor, blocksize: int, *, config: QuantizeConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Packed codes, ``UInt8[ceil(numel / 2)]``, and block maxima, ``Float32[blocks]``, with one read of the weight."""
    packed, absmax = _empty(weight, blocksize)
    if not weight.numel():
        return packed, absmax
    c = config or QuantizeConfig.choose(blocksize)
    launch(
        _kernels().quantize_kernel,
        (cdiv(absmax.numel(), c.blocks),),
        *(weight.contiguous(), packed, absmax, weight.numel(), packed.numel()),
        BLOCKSIZE=blocksize,
        BLOCKS=c.blocks,
        num_warps=c.num_warps,
        num_stages=1,
    )
    return packed, absmax


def _empty(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    numel = weight.numel()
    packed = weight.new_empty((numel + 1) // 2, dtype=torch.uint8)
    return packed, weight.new_empty(-(-numel // blocksize), dtype=torch.float32)


def _dequantize_op(
    q: Sequence[Tensor], layout: Sequence[int], row_scale: Tensor | None, out: Tensor
) -> None:
    dequantize_into(NF4Weight.rebuild(q, layout), out, row_scale)


def _quantize_op(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return quantize(weight, blocksize)


dequantize_triton = torch.library.custom_op(
    library_name("dequantize_nf4"),
    _dequantize_op,
    mutates_args=("out",),
    schema="(Tensor[] q, int[] layout, Tensor? row_scale, Tensor(a!) out) -> ()",
)
quantize_triton = torch.library.custom_op(
    library_name("quantize_nf4"),
    _quantize_op,
    mutates_args=(),
    schema="(Tensor weight, int blocksize) -> (Tensor, Tensor)",
)


@dequantize_triton.register_fake
def _(q: Sequence[Tensor], layout: Sequence[int], row_scale: Tensor | None, out: Tensor) -> None:
    """Nothing to compute: the op returns no tensor, it writes into ``out``."""


quantize_triton.register_fake(_empty)
