"""Stacks of expert weights in four bits: products that decode one expert at a time on the CPU, and one stack at a time on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkit.find.stacks import PackedStack
from peftkit.fuse.plan import Reason
from peftkit_kernels.core.autograd import once_differentiable
from peftkit_kernels.gemm import matmul_nn, matmul_nt
from peftkit_kernels.storage.nf4 import NF4Weight, dequantize_nf4
from peftkit_kernels.storage.nf4.weight import BLOCKSIZES, NestedAbsmax, level_table

Product = Callable[[Tensor, Tensor], Tensor]


def packed_reason(name: str, stack: PackedStack, x: Tensor) -> Reason | None:
    """Why rows of ``x`` cannot be multiplied by a stack, or ``None``."""
    state = stack.state
    if state.quant_type != "nf4" or not torch.equal(state.code.cpu(), level_table()):
        return Reason(f"{name} is stored as {state.quant_type}; only nf4 can be read")
    if state.blocksize not in BLOCKSIZES or state.shape[-1] % state.blocksize:
        return Reason(f"the rows of {name} are no whole blocks of {state.blocksize}")
    if not stack.packed.device == state.absmax.device == x.device:
        return Reason(
            f"its input is on {x.device}, {name} on {stack.packed.device} and its block maxima on {state.absmax.device}"
        )
    return None


def packed_product(x: Tensor, stack: PackedStack, counts: Tensor, transposed: bool) -> Tensor:
    """``grouped_product`` with a stack in four bits. The backward decodes it again, so no decoded weight is kept.

    Args:
        x: ``[M, K]``, sorted by expert.
        stack: ``[E, N, K]``, or ``[E, K, N]`` if ``transposed``; frozen.
        counts: ``Int[E]``, the number of rows of each expert.
        transposed: The layout of the stack.

    Returns:
        ``[M, N]``.
    """
    return _PackedProduct.apply(x, stack, counts, transposed)


class _PackedProduct(torch.autograd.Function):
    """``y[rows of e] = x[rows of e] W[e]ᵀ`` and ``dx[rows of e] = dy[rows of e] W[e]``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, stack: PackedStack, counts: Tensor, transposed: bool
    ) -> Tensor:
        ctx.stack, ctx.counts, ctx.transposed = stack, counts, transposed
        return _multiply(x, stack, counts, not transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _multiply(dy, ctx.stack, ctx.counts, ctx.transposed), None, None, None


def _multiply(x: Tensor, stack: PackedStack, counts: Tensor, by_rows: bool) -> Tensor:
    """``x W[e]ᵀ`` if ``by_rows``, else ``x W[e]``, for the rows of each expert."""
    weight = _nf4(stack)
    if x.device.type != "cpu":
        return by_grouped_mm(x, weight, counts, by_rows)
    return _by_expert(x, weight, counts, by_rows)


def by_grouped_mm(x: Tensor, weight: NF4Weight, counts: Tensor, by_rows: bool) -> Tensor:
    """``_multiply`` on a GPU: the whole stack is decoded, in the dtype of ``x``, for one grouped product."""
    dense = dequantize_nf4(weight, x.dtype)
    offsets = counts.cumsum(0, dtype=torch.int32)
    return torch.nn.functional.grouped_mm(x, dense.mT if by_rows else dense, offs=offsets)


def _by_expert(x: Tensor, weight: NF4Weight, counts: Tensor, by_rows: bool) -> Tensor:
    product: Product = matmul_nt if by_rows else matmul_nn
    out, start = x.new_empty(x.shape[0], weight.shape[1 if by_rows else 2]), 0
    for count, matrix in zip(counts.tolist(), _matrices(weight), strict=True):
        if count:
            rows = slice(start, start + count)
            out[rows] = product(x[rows], dequantize_nf4(matrix, x.dtype))
        start += count
    return out


def _nf4(stack: PackedStack) -> NF4Weight:
    state, nested = stack.state, None
    if state.nested:
        inner = state.state2
        nested = NestedAbsmax(inner.code, inner.absmax, state.offset, inner.blocksize)
    packed = stack.packed.data.view(torch.uint8)
    return NF4Weight(packed, state.absmax, tuple(state.shape), state.blocksize, nested)


def _matrices(weight: NF4Weight) -> Iterator[NF4Weight]:
    """The weights of single experts. They are whole blocks, and share the memory of the stack."""
    E, *shape = weight.shape
    packed = weight.packed.view(E, -1)
    absmax = weight.block_absmax().view(E, -1)
    for codes, maxima in zip(packed, absmax, strict=True):
        yield NF4Weight(codes, maxima, tuple(shape), weight.blocksize)
