"""8-bit products from torch ops: one pass quantises, a product multiplies the codes, one pass scales and adds the rest.

On a processor with AVX2 but without 8-bit dot products, native code multiplies, scales and adds in one pass.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from peftkit_kernels import native
from peftkit_kernels.core import workspace
from peftkit_kernels.core.checks import without_autocast
from peftkit_kernels.low_rank import cast
from peftkit_kernels.storage.int8.product.reference import outlier_columns
from peftkit_kernels.storage.int8.reference import quantize_rows_reference
from peftkit_kernels.storage.int8.weight import Int8Weight


@functools.cache
def multiplies_int8() -> bool:
    """Whether this processor has 8-bit products (AVX-512 VNNI or AMX) that ``torch._int_mm`` can use.

    Without them ``torch._int_mm`` multiplies one element at a time. Then native code multiplies the codes if it can
    (``native.has_int8_products``), otherwise they are multiplied as float32. If torch is kept from AVX-512
    (``ATEN_CPU_CAPABILITY=avx2``), the processor counts as one without them.
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return False
    return torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()


def quantize(x: Tensor, column_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The codes of ``x ∘ column_scale`` by rows, in the workspace, and the step of each row, ``Float32[M]``."""
    codes, absmax = _codes_and_absmax(x, column_scale)
    return codes, absmax.div_(127)


def _codes_and_absmax(x: Tensor, column_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    if native.supports(x):
        codes = workspace.take(x.shape, torch.int8, x.device)
        absmax = native.quantize_rows(x, column_scale, codes)
    else:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if column_scale is not None:
            wide = wide * column_scale
        codes, absmax = quantize_rows_reference(wide)
    return codes, absmax


def product(codes: Tensor, weight: Tensor) -> Tensor:
    """``codes weight`` for ``Int8[M, K]`` and ``Int8[K, N]``: ``Int32[M, N]``, or float32 without 8-bit products."""
    M, (K, N) = codes.shape[0], weight.shape
    if 1 not in weight.stride():
        weight = weight.contiguous()
    if K == 1:
        # torch 2.13 uses wrong strides for a single column
        return codes.int() * weight.int()
    if codes.device.type == "cpu" and multiplies_int8():
        out = workspace.take((M, N), torch.int32, codes.device)
        return torch.ops.aten._int_mm.out(codes, weight, out=out)
    # the sizes for which cuBLAS has 8-bit products
    if codes.device.type == "cuda" and M > 16 and K % 8 == 0 and N % 8 == 0:
        return torch.ops.aten._int_mm(codes, weight)
    with without_autocast(codes):
        return torch.mm(codes.float(), weight.float())


def epilogue(
    acc: Tensor,
    row_scale: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    s: Tensor | None,
    t: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``acc · row_scale · column_scale + bias + s t``, summed in float32 (float64 if ``dtype`` is float64) and rounded once."""
    wide = torch.promote_types(dtype, torch.float32)
    parts = [
        None if part is None else cast(part, wide).contiguous()
        for part in (column_scale, bias, s, t)
    ]
    if dtype is torch.float32 and acc.dtype is torch.int32 and native.supports(row_scale):
        return native.int8_epilogue(acc, row_scale, *parts)
    column_scale, bias, s, t = parts
    y = acc * row_scale.to(wide)[:, None]
    if column_scale is not None:
        y.mul_(column_scale)
    if bias is not None:
        y.add_(bias)
    if s is not None and t is not None:
        y.addmm_(s, t)
    return cast(y, dtype)


class Quantized(NamedTuple):
    """An input in 8 bits.

    Attributes:
        x: ``[M, K]``, the input itself.
        codes: ``Int8[M, K]``, in the workspace; 0 in the outlier columns.
        step: ``Float32[M]``.
        outliers: The columns that reach the threshold, or ``None`` if there are none.
        threshold: That.
    """

    x: Tensor
    codes: Tensor
    step: Tensor
    outliers: Tensor | None
    threshold: float | None


def quantize_input(x: Tensor, threshold: float | None) -> Quantized:
    """The rows ``x [M, K]`` in 8 bits, except the columns that reach the threshold."""
    codes, absmax = _codes_and_absmax(x.contiguous(), None)
    outliers = None
    # the largest magnitudes of the rows tell whether there is such a column; usually there is none
    if threshold is not None and bool((absmax >= threshold).any()):
        outliers = outlier_columns(x, threshold).nonzero().view(-1)
        codes, absmax = _codes_and_absmax(x.index_fill(1, outliers, 0.0).contiguous(), None)
    return Quantized(x, codes, absmax.div_(127), outliers, threshold)


def linear(
    quantized: Quantized, q: Int8Weight, bias: Tensor | None, s: Tensor | None, t: Tensor | None
) -> Tensor:
    """``x Wᵀ + bias + s t``, ``[M, N]`` in the dtype of ``x``."""
    x, codes, step, outliers, _ = quantized
    bias = None if bias is None else cast(bias, x.dtype)
    y = scaled_product(codes, q.codes.t(), step, q.row_scale(), bias, s, t, x.dtype)
    # outlier columns are multiplied with the decoded weight, in the dtype of x
    if outliers is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = q.codes[:, outliers] * q.row_scale().to(wide)[:, None]
        y.addmm_(x[:, outliers], cast(weight, x.dtype).t())
    return y


def input_grad(
    dy: Tensor, q: Int8Weight, s: Tensor | None, t: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """``dy W + s t``, ``[M, K]`` in the dtype of ``dy``, with the rows of ``dy ∘ sw`` in 8 bits; added to ``out`` if given."""
    codes, step = quantize(dy.contiguous(), q.row_scale())
    return scaled_product(codes, q.codes, step, None, None, s, t, dy.dtype, out)


def scaled_product(
    codes: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    s: Tensor | None,
    t: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """``(codes weight) · row_scale · column_scale + bias + s t``, ``[M, N]`` in ``dtype``, rounded once; added to ``out`` if given."""
    in_c = codes.is_cpu and not multiplies_int8() and native.has_int8_products()
    if in_c and dtype is torch.float32 and native.supports(row_scale):
        parts = [
            None if part is None else cast(part, dtype).contiguous()
            for part in (column_scale, bias, s, t)
        ]
        return native.int8_linear(codes, weight, row_scale, *parts, out)
    y = epilogue(product(codes, weight), row_scale, column_scale, bias, s, t, dtype)
    return y if out is None else out.add_(y)
