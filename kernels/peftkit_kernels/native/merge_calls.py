"""Weights with a merged update, quantised again, in C."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from peftkit_kernels.native.library import call

_ROUNDS = (None, "nf4", "int8")
"""What ``merge`` rounds to, by the numbers of the C source."""


def merge(
    packed: Tensor | None,
    codes: Tensor | None,
    absmax: Tensor | None,
    dense: Tensor | None,
    update: Tensor,
    maxima: Tensor | None,
    blocksize: int,
    scale: float,
    rounds: Literal["nf4", "int8"] | None,
) -> None:
    """``update = Q(W + scale · update)``; product and sum are each rounded.

    The weight is given in one of three forms, or in none if ``update`` contains it: ``packed`` and ``absmax``, ``codes`` and ``absmax``, or
    ``dense``.

    Args:
        packed: ``UInt8[N K / 2]``, contiguous: NF4.
        codes: ``Int8[N, K]``, contiguous.
        absmax: ``Float32``, contiguous: that of blocks for ``packed``, of rows for ``codes``.
        dense: ``Float32[N, K]`` with contiguous rows.
        update: ``Float32[N, K]``, contiguous.
        maxima: ``Float32[N K / blocksize]``: gets the largest magnitude of each block of the sum. ``None`` if it is not needed.
        blocksize: Elements of a block, of which rows consist.
        scale: Factor on the update.
        rounds: What Q quantises to, before it decodes again. ``None`` leaves the sum as it is.
    """
    stride = 0 if dense is None else dense.stride(0)
    sizes = *update.shape, stride, blocksize
    tensors = packed, codes, absmax, dense, update, maxima
    call("pk_merge", tensors, *sizes, scale, _ROUNDS.index(rounds))


def round_nf4(values: Tensor, maxima: Tensor, absmax: Tensor, blocksize: int) -> None:
    """The nearest levels of ``values`` relative to the block ``maxima``, times the stored ``absmax``, in place.

    Args:
        values: ``Float32[N, K]``, contiguous.
        maxima: ``Float32[blocks]``.
        absmax: ``Float32[blocks]``.
        blocksize: Elements of a block.
    """
    call("pk_round_nf4", (values, maxima, absmax), maxima.numel(), blocksize)
