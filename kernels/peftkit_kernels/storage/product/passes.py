"""The product with a quantised weight that decodes it in its loop, for few rows."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core.launch import cdiv, dot_precision, launch, target_of
from peftkit_kernels.low_rank import passes
from peftkit_kernels.low_rank.config import block_r
from peftkit_kernels.storage.int8 import Int8Weight
from peftkit_kernels.storage.nf4 import NF4Weight
from peftkit_kernels.storage.nf4.triton_impl import absmax_arguments, absmax_constants, words_of
from peftkit_kernels.storage.product.config import SmallConfig, nf4_step, small_rows
from peftkit_kernels.storage.quantized import QuantizedWeight


@functools.cache
def _kernels() -> Any:
    from peftkit_kernels.storage.product import kernels

    return kernels


def decodes_in_product(M: int, q: QuantizedWeight, target: Any) -> bool:
    """Whether ``small_m`` runs: ``M`` rows are few enough, and the kernel can read ``q``."""
    N, K = q.shape
    if not isinstance(q, (NF4Weight, Int8Weight)):
        return False
    if isinstance(q, NF4Weight) and not (nf4_step(K, q.blocksize) and words_of(q.packed)[1]):
        return False
    return small_rows(N, target=target) >= M


def small_m(
    x: Tensor,
    q: QuantizedWeight,
    bias: Tensor | None,
    s: Tensor | None,
    B: Tensor | None,
    scale: float,
    *,
    config: SmallConfig | None = None,
) -> Tensor:
    """``x Wᵀ + scale · s Bᵀ + bias`` with W decoded in the loop; a stored byte is read once for each tile of up to 64 rows.

    Args:
        x: ``[M, K]``, at least one row.
        q: The weight; 4-bit rows are whole steps (``nf4_step``) of whole words.
        bias: ``[N]`` in the dtype of ``x``, or ``None``.
        s: ``[M, R]``, or ``None``.
        B: ``[N, R]`` in the dtype of ``s``, or ``None``.
        scale: Factor on the update.
        config: Replaces the configuration that would be chosen.
    """
    (M, K), N, x = x.shape, q.shape[0], passes.readable(x)
    assert isinstance(q, (NF4Weight, Int8Weight)), "as decodes_in_product says"
    four_bit = isinstance(q, NF4Weight)
    assert isinstance(q, (NF4Weight, Int8Weight)), "decodes_in_product says which weights"
    c = config or SmallConfig.choose(
        *(M, N, K),
        block_k=nf4_step(K, q.blocksize) if four_bit else 64,
        itemsize=x.element_size(),
        four_bit=four_bit,
        nested=four_bit and q.nested is not None,
        target=target_of(x),
    )
    steps = cdiv(cdiv(K, c.block_k), c.splits)
    splits = cdiv(cdiv(K, c.block_k), steps)
    y = x.new_empty(M, N)
    partial = y if splits == 1 else x.new_empty(splits, M, N, dtype=torch.float32)
    R = 0 if s is None else s.shape[1]
    grid = cdiv(N, c.block_n), splits, cdiv(M, c.block_m)
    update = s, B, bias, partial, scale
    factors = (0, 0, 0) if s is None or B is None else (s.stride(0), *B.stride())
    constants = {
        "HAS_LORA": s is not None,
        "HAS_BIAS": bias is not None,
        "BLOCK_M": c.block_m,
        "BLOCK_N": c.block_n,
        "BLOCK_K": c.block_k,
        "BLOCK_R": block_r(max(R, 1)),
        "PRECISION": dot_precision(x.dtype, s),
        "num_warps": c.num_warps,
        "num_stages": c.num_stages,
    }
    if isinstance(q, Int8Weight):
        launch(
            _kernels().int8_small_m_kernel,
            grid,
            *(x, q.codes, q.row_absmax, *update, M, N, K, R, steps),
            *(x.stride(0), *q.codes.stride(), *factors, N),
            **constants,
        )
    else:
        launch(
            _kernels().nf4_small_m_kernel,
            grid,
            *(x, words_of(q.packed)[0], *absmax_arguments(q), *update, M, N, K, R, steps),
            *(x.stride(0), *factors, N),
            **absmax_constants(q),
            **constants,
        )
    if splits > 1:
        passes.add_up(partial, y)
    return y
