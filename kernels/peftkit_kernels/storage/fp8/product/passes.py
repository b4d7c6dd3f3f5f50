"""Float8 products on a GPU: Triton kernels quantise and transpose, ``torch._scaled_mm`` multiplies."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core import workspace
from peftkit_kernels.core.launch import cdiv, launch
from peftkit_kernels.low_rank import passes
from peftkit_kernels.storage.fp8.product import torch_impl
from peftkit_kernels.storage.fp8.product.config import QuantizeConfig, TransposeConfig
from peftkit_kernels.storage.fp8.product.torch_impl import Quantized
from peftkit_kernels.storage.fp8.weight import DTYPE, Float8Weight


@functools.cache
def _kernels() -> Any:
    from peftkit_kernels.storage.fp8.product import kernels

    return kernels


def quantize(
    x: Tensor, column_scale: Tensor | None = None, *, config: QuantizeConfig | None = None
) -> tuple[Tensor, Tensor]:
    """The codes of ``x ∘ column_scale`` by rows, ``Float8_e4m3fn[M, K]``, and the scale of each row, ``Float32[M]``.

    Args:
        x: ``[M, K]``, float32 or a 16-bit dtype.
        column_scale: ``Float32[K]`` or ``None``.
        config: Replaces the configuration that would be chosen.
    """
    (M, K), x = x.shape, passes.readable(x)
    c = config or QuantizeConfig.choose(K, itemsize=x.element_size())
    codes, scale = x.new_empty(M, K, dtype=DTYPE), x.new_empty(M, dtype=torch.float32)
    launch(
        _kernels().quantize_kernel,
        (cdiv(M, c.block_m),),
        *(x, column_scale, codes.view(torch.uint8), scale, M, K, x.stride(0)),
        HAS_SCALE=column_scale is not None,
        BLOCK_M=c.block_m,
        BLOCK_K=c.block_k,
        num_warps=c.num_warps,
        num_stages=2,
        # a code is a product that must be rounded before the sum that rounds it to an integer
        fp_fusion=False,
    )
    return codes, scale


def transposed(q: Float8Weight, *, config: TransposeConfig | None = None) -> Tensor:
    """The codes ``[N, K]`` of a weight with contiguous columns, in the workspace."""
    (N, K), c = q.shape, config or TransposeConfig()
    out = workspace.take((K, N), torch.uint8, q.device)
    launch(
        _kernels().transpose_kernel,
        (cdiv(N, c.block), cdiv(K, c.block)),
        *(q.codes.view(torch.uint8), out, N, K, q.codes.stride(0)),
        BLOCK=c.block,
        num_warps=c.num_warps,
        num_stages=1,
    )
    return out.view(DTYPE).t()


def quantize_input(x: Tensor) -> Quantized:
    """The rows ``x [M, K]`` in float8."""
    return Quantized(x, *quantize(x))


def input_grad(dy: Tensor, q: Float8Weight) -> Tensor:
    """``(g8 W8) · sg`` with ``g = dy ∘ sw``, ``[M, K]`` in the dtype of ``dy``."""
    g = Quantized(dy, *quantize(dy, q.row_scale))
    if not torch_impl.is_native(g, q):
        return torch_impl.wide_input_grad(g, q)
    # the tensor cores of Hopper read both operands along the summed dimension
    return torch_impl.scaled_product(g, transposed(q), None, None, fast=False)
