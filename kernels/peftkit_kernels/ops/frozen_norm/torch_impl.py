"""The frozen norms from torch ops. They keep only x and one number for each row (LayerNorm: two)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkit_kernels import native
from peftkit_kernels.core.autograd import once_differentiable


def rms_norm_forward(
    x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    """The normalised ``x`` and ``rsqrt(mean(x²) + eps)``, ``[..., 1]``; as ``rms_norm_reference``."""
    if native.supports(x, weight):
        return native.rms_norm(x, weight, eps, offset)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * rstd
    if round_first:
        return normed.to(x.dtype) * (offset + weight if offset else weight), rstd
    return normed.mul_(offset + weight.to(wide.dtype)).to(x.dtype), rstd


class FrozenRMSNorm(torch.autograd.Function):
    """With ``r = rsqrt(mean(x²) + eps)`` and ``u = dy ∘ (offset + w)``: ``dx = r (u - x r² mean(u ∘ x))``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool
    ) -> Tensor:
        y, rstd = rms_norm_forward(x, weight, eps, offset, round_first)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dy = dy.contiguous()
        if native.supports(x, weight, dy):
            return native.rms_norm_backward(dy, x, weight, rstd, ctx.offset), None, None, None, None
        wide = x.to(rstd.dtype)
        u = dy.to(rstd.dtype) * (ctx.offset + weight.to(rstd.dtype))
        correction = (u * wide).mean(-1, keepdim=True) * rstd.square()
        return u.sub_(wide * correction).mul_(rstd).to(x.dtype), None, None, None, None


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised ``x``, its mean and ``rsqrt(var + eps)``, ``[..., 1]``; as ``layer_norm_reference``."""
    if native.supports(x, weight, *(() if bias is None else (bias,))):
        return native.layer_norm(x, weight, bias, eps)
    return torch.native_layer_norm(x, (x.shape[-1],), weight, bias, eps)


class FrozenLayerNorm(torch.autograd.Function):
    """With ``n = (x - mean) r`` and ``u = dy ∘ w``: ``dx = r (u - mean(u) - n mean(u ∘ n))``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = layer_norm_forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        dy = dy.contiguous()
        if native.supports(x, weight, dy):
            return native.layer_norm_backward(dy, x, weight, mean, rstd), None, None, None
        # the mask requests dx alone, so torch skips the gradients of weight and bias
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            dy, x, (x.shape[-1],), mean, rstd, weight, None, [True, False, False]
        )
        return dx, None, None, None
