"""The steps of the frozen norms by torch operations, and by native code if there is any."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels import native


class TorchPasses:
    """The steps of ``ops.frozen_norm.schedule``."""

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool
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

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The normalised ``x``, its mean and ``rsqrt(var + eps)``, ``[..., 1]``; as ``layer_norm_reference``."""
        if native.supports(x, weight, *(() if bias is None else (bias,))):
            return native.layer_norm(x, weight, bias, eps)
        return torch.native_layer_norm(x, (x.shape[-1],), weight, bias, eps)

    def grad_x(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        mean: Tensor | None,
        rstd: Tensor,
        offset: float,
    ) -> Tensor:
        """``dx``: of LayerNorm if ``mean`` is given, otherwise of RMSNorm."""
        dy = dy.contiguous()
        is_native = native.supports(x, weight, dy)
        if mean is None:
            if is_native:
                return native.rms_norm_backward(dy, x, weight, rstd, offset)
            wide = x.to(rstd.dtype)
            u = dy.to(rstd.dtype) * (offset + weight.to(rstd.dtype))
            correction = (u * wide).mean(-1, keepdim=True) * rstd.square()
            return u.sub_(wide * correction).mul_(rstd).to(x.dtype)
        if is_native:
            return native.layer_norm_backward(dy, x, weight, mean, rstd)
        # the mask requests dx alone, so torch skips the gradients of weight and bias
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            dy, x, (x.shape[-1],), mean, rstd, weight, None, [True, False, False]
        )
        return dx
