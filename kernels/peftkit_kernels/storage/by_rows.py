"""Decoding of matrices that have one code for each element and one scale for each row: 8-bit integers and float8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core.dispatch import Backend, choose_backend
from peftkit_kernels.core.launch import cdiv, launch
from peftkit_kernels.storage.target import decode_target


@dataclass(frozen=True, slots=True)
class DequantizeConfig:
    """Each program decodes one tile; each thread loads 16 codes at once."""

    block_n: int = 8
    block_k: int = 256
    num_warps: int = 4


def dequantize(
    name: str,
    q: Any,
    dtype: torch.dtype,
    out: Tensor | None,
    row_scale: Tensor | None,
    backend: Backend,
    *,
    reference: Callable[[Any, torch.dtype, Tensor | None], Tensor],
    by_torch: Callable[[Any, Tensor, Tensor | None], Tensor],
    by_triton: Callable[..., Any],
) -> Tensor:
    """``q`` decoded by one of three functions that give the same bits.

    Args:
        name: The public function, for errors.
        q: The weight, ``[N, K]``.
        dtype: The dtype of the result if ``out`` is ``None``.
        out: ``[N, K]`` to write to, or ``None``.
        row_scale: ``Float32[N]``, another factor on each row, or ``None``.
        backend: The user's choice.
        reference: The definition, which returns a new tensor.
        by_torch: Writes into its second argument.
        by_triton: The torch.library op: the tensors of ``q``, the factor on rows, and where to write.

    Raises:
        ValueError: ``out`` or ``row_scale`` do not fit, the dtype is not one of decoded weights, or the backend cannot run.
    """
    result = decode_target(q.shape, q.device, dtype, out, row_scale)
    chosen = choose_backend(name, backend, result, *q.tensors(), has_dot=False)
    if chosen == "reference":
        values = reference(q, result.dtype, row_scale)
        return values if out is None else out.copy_(values)
    if chosen == "triton":
        by_triton(*q.tensors(), None if row_scale is None else row_scale.detach(), result)
        return result
    return by_torch(q, result, row_scale)


def launch_dequantize(
    kernel: Any,
    codes: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    out: Tensor,
    config: DequantizeConfig | None,
) -> Tensor:
    """Decode with ``kernel`` into ``out [N, K]`` of any strides; ``config`` replaces the default.

    Args:
        kernel: A Triton kernel with the arguments of those in ``int8`` and ``fp8``.
        codes: ``[N, K]``, one byte for each element.
        scale: ``Float32[N]``, what is stored for each row.
        row_scale: ``Float32[N]`` or ``None``.
        out: ``[N, K]`` in a floating-point dtype.
        config: The tile, or ``None``.
    """
    N, K = codes.shape
    if not out.numel():
        return out
    c = config or DequantizeConfig()
    launch(
        kernel,
        (cdiv(N, c.block_n), cdiv(K, c.block_k)),
        *(codes, scale.contiguous()),
        *(None if row_scale is None else row_scale.contiguous(), out),
        *(N, K, *codes.stride(), *out.stride()),
        HAS_SCALE=row_scale is not None,
        BLOCK_N=c.block_n,
        BLOCK_K=c.block_k,
        num_warps=c.num_warps,
        num_stages=1,
    )
    return out
