"""The frozen norms by one Triton kernel each way, as torch.library ops: traceable, and differentiable once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core.launch import aligned, cdiv, launch
from peftkit_kernels.core.op import Differentiable, Op
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
    y, rstd = x.new_empty(x.shape, dtype=_rms_dtype(x, weight, round_first)), _numbers(x)
    _launch_forward(x, weight, None, y, None, rstd, eps, offset, round_first)
    return y, rstd


def rms_forward_of_sum(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    """``rms_forward`` of ``x + residual``, which is rounded and written over ``x``, contiguous."""
    y, rstd = x.new_empty(x.shape, dtype=_rms_dtype(x, weight, round_first)), _numbers(x)
    _launch_forward(x, weight, None, y, None, rstd, eps, offset, round_first, residual)
    return y, rstd


def _rms_dtype(x: Tensor, weight: Tensor, round_first: bool) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype) if round_first else x.dtype


def layer_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``y`` as ``layer_norm_reference`` defines it, mean and ``rstd = rsqrt(var + eps)``, ``Float32[M]`` each."""
    y, mean, rstd = x.new_empty(x.shape), _numbers(x), _numbers(x)
    _launch_forward(x, weight, bias, y, mean, rstd, eps, 0.0, False)
    return y, mean, rstd


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


def _rms_like(
    x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=_rms_dtype(x, weight, round_first)), _numbers(x)


def _layer_like(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), _numbers(x), _numbers(x)


def _grad_like(dy: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _keep_rms(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.offset, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _keep_layer(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)


def _rms_backward(ctx: Any, needs: Sequence[bool], dy: Tensor) -> tuple[Tensor]:
    x, weight, rstd = ctx.saved_tensors
    return (_backward_op(dy, x, weight, None, rstd, ctx.offset),)


def _layer_backward(ctx: Any, needs: Sequence[bool], dy: Tensor) -> tuple[Tensor]:
    x, weight, mean, rstd = ctx.saved_tensors
    return (_backward_op(dy, x, weight, mean, rstd, 0.0),)


rms_norm_op = Op(
    "frozen_rms_norm",
    "(Tensor x, Tensor weight, float eps, float offset, bool round_first) -> (Tensor, Tensor)",
    rms_forward,
    _rms_like,
)
frozen_rms_norm_triton = Differentiable(rms_norm_op, ("x",), _keep_rms, _rms_backward)
layer_norm_op = Op(
    "frozen_layer_norm",
    "(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    layer_forward,
    _layer_like,
)
frozen_layer_norm_triton = Differentiable(layer_norm_op, ("x",), _keep_layer, _layer_backward)
_backward_op = Op(
    "frozen_norm_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor? mean, Tensor rstd, float offset) -> Tensor",
    backward,
    _grad_like,
)
