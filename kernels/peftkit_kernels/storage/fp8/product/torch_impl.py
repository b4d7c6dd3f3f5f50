"""Float8 products from torch ops: ``torch._scaled_mm`` on GPUs that have them, elsewhere the same codes in a wider dtype.

Every product of two codes is exact in float16, so the wider products differ only in the order in which float32 sums are rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.core import workspace
from peftkit_kernels.core.checks import without_autocast
from peftkit_kernels.core.launch import target_of
from peftkit_kernels.gemm import matmul_nn, matmul_nt
from peftkit_kernels.low_rank import cast
from peftkit_kernels.storage.fp8.reference import quantize_rows_reference
from peftkit_kernels.storage.fp8.weight import Float8Weight

FIRST_CAPABILITY = 89
"""The compute capability from which GPUs multiply in float8."""

MULTIPLE = 16
"""``torch._scaled_mm`` needs widths that are multiples of this, and rows that start at multiples of as many bytes."""


class Quantized:
    """An input in float8.

    Attributes:
        x: ``[M, K]``, the input itself.
        codes: ``Float8_e4m3fn[M, K]``.
        scale: ``Float32[M]``.
    """

    __slots__ = ("_wide", "codes", "scale", "x")

    def __init__(self, x: Tensor, codes: Tensor, scale: Tensor):
        self.x, self.codes, self.scale = x, codes, scale
        self._wide: Tensor | None = None

    def wide(self, dtype: torch.dtype) -> Tensor:
        """The codes in a dtype in which the processor multiplies; converted once."""
        if self._wide is None:
            self._wide = self.codes.to(dtype)
        return self._wide


def has_products(x: Tensor) -> bool:
    """Whether the GPU of ``x`` multiplies in float8."""
    return (target_of(x).capability or 0) >= FIRST_CAPABILITY


def scales_in_product(x: Tensor) -> bool:
    """Whether ``torch._scaled_mm`` takes scales of rows on the GPU of ``x``, which it does for bfloat16 results."""
    capability = target_of(x).capability or 0
    return capability == FIRST_CAPABILITY or capability // 10 in (9, 10, 12)


def quantize_input(x: Tensor) -> Quantized:
    """The rows ``x [M, K]`` in float8."""
    return Quantized(x, *quantize_rows_reference(x))


def linear(quantized: Quantized, q: Float8Weight, bias: Tensor | None) -> Tensor:
    """``x8 W8ᵀ · sx · sw + bias``, ``[M, N]`` in the dtype of ``x``."""
    x = quantized.x
    bias = None if bias is None else cast(bias, x.dtype)
    if is_native(quantized, q):
        # fast accumulation: the sums of a forward need no more bits than the codes give them
        return scaled_product(quantized, q.codes.t(), q.row_scale, bias, fast=True)
    dtype = _product_dtype(x)
    acc = _wide_product(quantized.wide(dtype), _decoded(q, dtype), is_transposed=True)
    return _scaled(acc, quantized.scale, q.row_scale, bias, x.dtype)


def input_grad(dy: Tensor, q: Float8Weight) -> Tensor:
    """``(g8 W8) · sg`` with ``g = dy ∘ sw``, ``[M, K]`` in the dtype of ``dy``."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    g = Quantized(dy, *quantize_rows_reference(dy.to(wide) * q.row_scale))
    if is_native(g, q):
        codes = workspace.take(q.shape[::-1], torch.uint8, q.device)
        codes.copy_(q.codes.view(torch.uint8).t())
        return scaled_product(g, codes.view(q.codes.dtype).t(), None, None, fast=False)
    return wide_input_grad(g, q)


def wide_input_grad(g: Quantized, q: Float8Weight) -> Tensor:
    """``input_grad`` of quantised rows ``g`` in a dtype that every processor multiplies; in the dtype of ``g.x``."""
    dtype = _product_dtype(g.x)
    acc = _wide_product(g.wide(dtype), _decoded(q, dtype), is_transposed=False)
    return _scaled(acc, g.scale, None, None, g.x.dtype)


def is_native(quantized: Quantized, q: Float8Weight) -> bool:
    """Whether ``torch._scaled_mm`` multiplies these rows and this weight."""
    (N, K), codes = q.shape, q.codes
    sizes = N, K, 0 if codes.is_meta else codes.data_ptr()
    return (
        has_products(quantized.x)
        and quantized.x.shape[0] > 0
        and codes.is_contiguous()
        and not any(size % MULTIPLE for size in sizes)
    )


def scaled_product(
    quantized: Quantized,
    weight: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    *,
    fast: bool,
) -> Tensor:
    """``(codes weight) · row scales · column_scale + bias`` by ``torch._scaled_mm``, in the dtype of the unquantised rows.

    Args:
        quantized: The rows ``[M, K]``.
        weight: ``Float8_e4m3fn[K, N]``, its columns contiguous, as the tensor cores of Hopper need them.
        column_scale: ``Float32[N]`` or ``None``.
        bias: ``[N]`` in the dtype of the result, or ``None``.
        fast: Whether sums may have fewer than the 24 bits of float32 (they have about 14 on Hopper).
    """
    dtype, N = quantized.x.dtype, weight.shape[1]
    codes, scale = quantized.codes, quantized.scale
    product = torch.ops.aten._scaled_mm.default
    if dtype is torch.bfloat16 and scales_in_product(codes):
        columns = scale.new_ones(N) if column_scale is None else column_scale
        scales = scale[:, None], columns[None, :]
        return product(codes, weight, *scales, bias, None, dtype, fast)
    # one scale for the whole product is supported for every dtype of the result
    one = scale.new_ones(())
    acc = product(codes, weight, one, one, None, None, torch.float32, fast)
    return _scaled(acc, scale, column_scale, bias, dtype)


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which decoded codes are multiplied: float16 on a GPU, whose sums are float32; on the CPU float32 or wider."""
    return torch.float16 if x.is_cuda else torch.promote_types(x.dtype, torch.float32)


def _decoded(q: Float8Weight, dtype: torch.dtype) -> Tensor:
    """The codes of a weight as numbers, in the workspace."""
    return workspace.take(q.shape, dtype, q.device).copy_(q.codes)


def _wide_product(codes: Tensor, weight: Tensor, *, is_transposed: bool) -> Tensor:
    with without_autocast(codes):
        if codes.dtype is torch.float16:
            other = weight.t() if is_transposed else weight
            return torch.mm(codes, other, out_dtype=torch.float32)
        return matmul_nt(codes, weight) if is_transposed else matmul_nn(codes, weight)


def _scaled(
    acc: Tensor,
    row_scale: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``acc · row_scale · column_scale + bias``, computed in place and rounded once."""
    acc.mul_(row_scale[:, None])
    if column_scale is not None:
        acc.mul_(column_scale)
    if bias is not None:
        acc.add_(bias)
    return cast(acc, dtype)
