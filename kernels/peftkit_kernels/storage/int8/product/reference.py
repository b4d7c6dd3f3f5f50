"""The definition of products with 8-bit weights in 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.storage.int8.reference import (
    dequantize_int8_reference,
    quantize_rows_reference,
)
from peftkit_kernels.storage.int8.weight import Int8ComputeWeight, Int8Weight


def product_reference(x: Tensor, q: Int8ComputeWeight) -> Tensor:
    """``x Wᵀ`` for rows ``x [M, K]`` in 8 bits, with the gradient that ``q`` defines; float32 for a 16-bit ``x``."""
    return _Product.apply(x, q)


def outlier_columns(x: Tensor, threshold: float) -> Tensor:
    """``Bool[K]``: the columns of ``x [M, K]`` in which some magnitude reaches ``threshold``."""
    return (x.abs() >= threshold).any(0)


class _Product(torch.autograd.Function):
    """Sums of codes are exact in float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Int8ComputeWeight) -> Tensor:
        ctx.q, ctx.dtype = q, x.dtype
        return _in_8_bits(x, q, q.threshold)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.q.backward_in_8_bits:
            dx = _product(dy * ctx.q.row_scale().to(dy.dtype), ctx.q.codes)
        else:
            dy = dy.to(ctx.dtype)
            dx = dy @ dequantize_int8_reference(ctx.q, dy.dtype)
        return dx.to(ctx.dtype), None


def _in_8_bits(x: Tensor, q: Int8Weight, threshold: float | None) -> Tensor:
    """``x Wᵀ`` with both operands in 8 bits, except outlier columns; float32 for a 16-bit ``x``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    outliers = None if threshold is None else outlier_columns(x, threshold)
    inner = wide if outliers is None else wide.masked_fill(outliers, 0.0)
    y = _product(inner, q.codes.t()) * q.row_scale().to(wide.dtype)
    if outliers is not None:
        weight = q.codes.to(wide.dtype) * q.row_scale().to(wide.dtype)[:, None]
        y = y + (wide * outliers) @ weight.t()
    return y


def _product(x: Tensor, codes: Tensor) -> Tensor:
    """``x codes`` with the rows of ``x`` in 8 bits."""
    quantised, absmax = quantize_rows_reference(x)
    total = quantised.double() @ codes.double()
    return (total * (absmax / 127)[:, None].double()).to(x.dtype)
