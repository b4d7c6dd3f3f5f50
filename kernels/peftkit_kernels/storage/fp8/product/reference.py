"""The definition of products with float8 weights in float8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.storage.fp8.reference import quantize_rows_reference
from peftkit_kernels.storage.fp8.weight import Float8Weight


def product_reference(x: Tensor, q: Float8Weight) -> Tensor:
    """``x8 W8ᵀ · sx · sw`` for rows ``x [M, K]``; float32 for a 16-bit ``x``.

    Quantising has no useful derivative. The gradient of ``x`` is defined as ``(g8 W8) · sg`` with ``g = dy ∘ sw``.
    """
    return _Product.apply(x, q.codes, q.row_scale)


class _Product(torch.autograd.Function):
    """Sums of products of codes are exact in float64."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, codes: Tensor, row_scale: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return (_product(x, codes.t()) * row_scale).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, codes, row_scale = inputs
        ctx.save_for_backward(codes, row_scale)
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        codes, row_scale = ctx.saved_tensors
        return _product(dy * row_scale, codes).to(ctx.dtype), None, None


def _product(x: Tensor, codes: Tensor) -> Tensor:
    """``x codes``, in float64, with the rows of ``x`` in float8."""
    quantised, scale = quantize_rows_reference(x)
    return quantised.double() @ codes.double() * scale[:, None].double()
