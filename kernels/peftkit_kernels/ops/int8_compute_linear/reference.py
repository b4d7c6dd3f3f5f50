"""The definition of ``int8_compute_linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core.dropout import apply_dropout
from peftkit_kernels.low_rank import LoRA, adapter_dtype
from peftkit_kernels.storage.int8 import Int8Weight
from peftkit_kernels.storage.int8.reference import quantize_rows_reference


def int8_compute_linear_reference(
    x: Tensor,
    q: Int8Weight,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    *,
    threshold: float | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """``y = x8 W8ᵀ · sx · sw + bias + scale · drop(x) Aᵀ Bᵀ``; arguments and result as ``int8_compute_linear``."""
    dtype = compute_dtype or x.dtype
    flat = x.to(dtype).reshape(-1, x.shape[-1])
    wide = torch.promote_types(dtype, torch.float32)
    y = _Int8Product.apply(flat, q, threshold).to(wide)
    if bias is not None:
        y = y + bias.to(dtype).to(wide)
    if lora is not None:
        factors = compute_dtype or adapter_dtype(x, lora.A)
        s = apply_dropout(flat.to(factors), lora.p, lora.seed) @ lora.A.to(factors).t()
        y = y + s.to(wide) @ lora.B.to(factors).to(wide).t() * lora.scale
    return y.to(dtype).reshape(*x.shape[:-1], q.shape[0])


def outlier_columns(x: Tensor, threshold: float | None) -> Tensor | None:
    """``Bool[K]``: the columns of ``x [M, K]`` in which some magnitude reaches ``threshold``; ``None`` if there is no threshold."""
    return None if threshold is None else (x.abs() >= threshold).any(0)


class _Int8Product(torch.autograd.Function):
    """``x Wᵀ`` with both operands in 8 bits. Its gradient is defined as ``(dy ∘ sw) W8`` with ``dy ∘ sw`` in 8 bits.

    Sums of codes are exact in float64. The result is float32 for a 16-bit ``x``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Int8Weight, threshold: float | None) -> Tensor:
        ctx.q = q
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        outliers = outlier_columns(x, threshold)
        inner = wide if outliers is None else wide.masked_fill(outliers, 0.0)
        y = _product(inner, q.codes.t()) * q.row_scale().to(wide.dtype)
        if outliers is not None:
            weight = q.codes.to(wide.dtype) * q.row_scale().to(wide.dtype)[:, None]
            y = y + (wide * outliers) @ weight.t()
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _product(dy * ctx.q.row_scale().to(dy.dtype), ctx.q.codes), None, None


def _product(x: Tensor, codes: Tensor) -> Tensor:
    """``x codes`` with the rows of ``x`` in 8 bits."""
    quantised, absmax = quantize_rows_reference(x)
    total = quantised.double() @ codes.double()
    return (total * (absmax / 127)[:, None].double()).to(x.dtype)
