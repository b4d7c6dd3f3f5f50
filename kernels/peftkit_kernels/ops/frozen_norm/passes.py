"""Launches of the norms' kernels, one each way."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core.launch import aligned, cdiv, launch
from peftkit_kernels.low_rank import rows
from peftkit_kernels.low_rank.passes import readable
from peftkit_kernels.ops.frozen_norm.config import NormConfig


@functools.cache
def _kernels() -> Any:
    from peftkit_kernels.ops.frozen_norm import kernels

    return kernels


def rms_forward(
    x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    """``y`` as ``rms_norm_reference`` defines it and ``rstd = rsqrt(mean(x²) + eps)``, ``Float32[M]``."""
    y, rstd = rms_like(x, weight, round_first)
    _launch_forward(x, weight, None, y, None, rstd, eps, offset, round_first)
    return y, rstd


def rms_forward_of_sum(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    """``rms_forward`` of ``x + residual``, which is rounded and written over ``x``, contiguous."""
    y, rstd = rms_like(x, weight, round_first)
    _launch_forward(x, weight, None, y, None, rstd, eps, offset, round_first, residual)
    return y, rstd


def rms_like(x: Tensor, weight: Tensor, round_first: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised results of ``rms_forward``."""
    dtype = torch.promote_types(x.dtype, weight.dtype) if round_first else x.dtype
    return x.new_empty(x.shape, dtype=dtype), _numbers(x)


def layer_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``y`` as ``layer_norm_reference`` defines it, mean and ``rstd = rsqrt(var + eps)``, ``Float32[M]`` each."""
    y, mean, rstd = layer_like(x)
    _launch_forward(x, weight, bias, y, mean, rstd, eps, 0.0, False)
    return y, mean, rstd


def layer_like(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised results of ``layer_forward``."""
    return x.new_empty(x.shape), _numbers(x), _numbers(x)


def _numbers(x: Tensor) -> Tensor:
    """One uninitialised float32 number for each row."""
    return x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


def _launch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    eps: float,
    offset: float,
    round_first: bool,
    residual: Tensor | None = None,
) -> None:
    """Fill ``y``, ``mean`` and ``rstd``. The norm is RMSNorm if ``mean`` is ``None``, else LayerNorm."""
    flat, y = readable(rows(x)), rows(y)
    more = None if residual is None else readable(rows(residual))
    M, K = flat.shape
    if not M:
        return
    weight, bias = readable(weight), None if bias is None else readable(bias)
    c = NormConfig.choose(K, aligned=aligned(flat, y) and (more is None or aligned(more)))
    launch(
        _kernels().norm_forward_kernel,
        (cdiv(M, c.block_m),),
        *(flat, weight, bias, y, mean, rstd, more, eps, offset),
        *(M, K, flat.stride(0), y.stride(0), 0 if more is None else more.stride(0)),
        ADD=more is not None,
        CENTRE=mean is not None,
        HAS_BIAS=bias is not None,
        HAS_OFFSET=offset != 0.0,
        ROUND_FIRST=round_first,
        BLOCK_M=c.block_m,
        BLOCK_K=c.block_k,
        num_warps=c.num_warps,
        num_stages=1,
    )


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    offset: float,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """``dx + residual``: of LayerNorm if ``mean`` is given, otherwise of RMSNorm."""
    dx = x.new_empty(x.shape)
    more = None if residual is None else readable(rows(residual))
    flat_dy, flat, flat_dx = readable(rows(dy)), readable(rows(x)), rows(dx)
    M, K = flat.shape
    if M:
        tensors = (flat_dy, flat, flat_dx) if more is None else (flat_dy, flat, flat_dx, more)
        c = NormConfig.choose(K, aligned=aligned(*tensors))
        launch(
            _kernels().norm_backward_kernel,
            (cdiv(M, c.block_m),),
            *(flat_dy, flat, readable(weight), mean, rstd, flat_dx, more, offset),
            *(M, K, flat_dy.stride(0), flat.stride(0), flat_dx.stride(0)),
            0 if more is None else more.stride(0),
            ADD=more is not None,
            CENTRE=mean is not None,
            HAS_OFFSET=offset != 0.0,
            BLOCK_M=c.block_m,
            BLOCK_K=c.block_k,
            num_warps=c.num_warps,
            num_stages=1,
        )
    return dx
