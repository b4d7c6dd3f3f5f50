"""The steps of ``dora_norm`` and ``dora_linear`` by torch operations, and by native code if there is any."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftkit_kernels import low_rank, native
from peftkit_kernels.core import workspace
from peftkit_kernels.core.blocks import starts
from peftkit_kernels.gemm import matmul_nn, matmul_nt
from peftkit_kernels.low_rank import LoRA, cast
from peftkit_kernels.ops.dora_scale.torch_passes import column_products, scaled
from peftkit_kernels.storage.quantized import Weight, decode, dense

_NORM_ROWS = 128
"""Rows of a weight that are processed at a time: at a width of 2,048 they are 1 MiB, which stays in the second-level cache."""


class TorchPasses:
    """The steps of ``ops.dora.schedule`` and of ``ops.dora.norm_schedule``."""

    def weight_norm(self, weight: Weight, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """``|W + scale · B A|`` of every row, ``[N]``, in float32 (float64 for a float64 weight or factor)."""
        return _weight_norm(weight, A, B, scale)

    def shrink(self, x: Tensor, lora: LoRA) -> Tensor:
        """``s = drop(x) Aᵀ``, ``[M, R]``."""
        return low_rank.shrink(x, lora.A, lora.p, lora.seed)

    def direction(self, x: Tensor, weight: Weight, s: Tensor, lora: LoRA) -> Tensor:
        """``z = x Wᵀ + scale · s Bᵀ``, ``[M, N]``."""
        return low_rank.expand_(matmul_nt(x, dense(weight, x.dtype)), s, lora.B, lora.scale)

    def scale(self, z: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
        """``z ∘ g + bias``, a new tensor."""
        return scaled(z, g, bias)

    def folded(
        self, x: Tensor, weight: Weight, s: Tensor, lora: LoRA, g: Tensor, bias: Tensor | None
    ) -> Tensor:
        """``x (g W)ᵀ + scale · s (g B)ᵀ + bias``."""
        y = matmul_nt(x, scaled_weight(weight, g, x.dtype), bias)
        return low_rank.expand_(y, s, lora.B * g[:, None], lora.scale)

    def scaled_in_place(
        self, x: Tensor, weight: Tensor, s: Tensor, lora: LoRA, g: Tensor, bias: Tensor | None
    ) -> Tensor:
        """``g ∘ (x Wᵀ + scale · s Bᵀ) + bias``."""
        return _add_and_scale_(matmul_nt(x, cast(weight, x.dtype)), s, lora, g, bias)

    def grad_magnitude(
        self, dy: Tensor, y: Tensor, bias: Tensor | None, magnitude: Tensor
    ) -> Tensor:
        """``Σ dy ∘ (y - bias) / magnitude``."""
        return _magnitude_grad(dy, y, bias, magnitude)

    def grad_magnitude_of_direction(
        self, dy: Tensor, z: Tensor, norm: Tensor, magnitude: Tensor
    ) -> Tensor:
        """``Σ dy ∘ z / norm`` in the dtype of the magnitude."""
        return cast(column_products(dy, z) / norm, magnitude.dtype)

    def grads_at_output(
        self, dy: Tensor, s: Tensor | None, lora: LoRA, g: Tensor, needs_ds: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradient of B if ``s`` is given, and ``ds = scale · dy (g B)`` if it is needed."""
        # B takes the rows' factors, so that ds needs no scaled copy of dy; in the dtype of g
        B, dB = lora.B * g[:, None], None
        if s is not None:
            dB = low_rank.grad_b(dy, s, lora.scale, B).mul_(g[:, None]).to(lora.B.dtype)
        return dB, low_rank.grad_s(dy, B, lora.scale) if needs_ds else None

    def grad_a(self, x: Tensor, ds: Tensor, lora: LoRA) -> Tensor:
        """``dA = dsᵀ drop(x)``."""
        return low_rank.grad_a(ds, x, lora.A.dtype, lora.p, lora.seed)

    def grad_x(
        self, dy: Tensor, weight: Weight, g: Tensor, ds: Tensor, lora: LoRA, *, folded: bool
    ) -> Tensor:
        """``dx = (dy ∘ g) W + mask ∘ (ds A)``; ``g`` multiplies the rows of ``W`` if it is folded into them."""
        if folded:
            dx = matmul_nn(dy, scaled_weight(weight, g, dy.dtype))
        else:
            dx = matmul_nn(scaled(dy, g, None), dense(weight, dy.dtype))
        return low_rank.expand_grad_(dx, ds, lora.A, lora.p, lora.seed)


def _weight_norm(weight: Weight, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``|W + scale · B A|`` of every row without forming the sum, in float32 (float64 for a float64 weight or factor).

    The square is ``|W|² + 2 scale · B ∘ (W Aᵀ) + scale² · B (A Aᵀ) ∘ B``, each term summed over the row. A sum that rounding
    made negative counts as 0.
    """
    wide = torch.promote_types(A.dtype, torch.float32)
    if isinstance(weight, Tensor):
        wide = torch.promote_types(wide, weight.dtype)
    else:
        weight = decode(weight, wide)
    A, B = cast(A, wide), cast(B, wide)
    if A.shape[0] <= native.MAX_RANK and native.supports(weight, A, B):
        return native.updated_norm(weight, A, B, scale)
    squares = A.new_empty(weight.shape[0])
    for start in starts(weight.shape[0], _NORM_ROWS):
        part, factor = (t[start : start + _NORM_ROWS] for t in (weight, B))
        part = cast(part, wide)
        cross = matmul_nt(part, A).mul_(factor).sum(1)
        squares[start : start + _NORM_ROWS] = part.square().sum(1).add_(cross, alpha=2.0 * scale)
    squares.add_(torch.mm(B, torch.mm(A, A.t())).mul_(B).sum(1), alpha=scale**2)
    return squares.clamp_(min=0.0).sqrt_()


def scaled_weight(
    weight: Weight, factor: Tensor, dtype: torch.dtype, decode: Callable[..., Tensor] = decode
) -> Tensor:
    """The rows of the weight times ``factor``, in ``dtype``, in the workspace; ``decode`` has the signature of ``quantized.decode``."""
    if isinstance(weight, Tensor):
        out = workspace.take(tuple(weight.shape), dtype, weight.device)
        for block in low_rank.blocks(weight):
            torch.mul(cast(weight[block], dtype), factor[block, None], out=out[block])
        return out
    if dtype is torch.float64:
        return decode(weight, dtype).mul_(factor[:, None])
    return decode(weight, dtype, cast(factor, torch.float32))


def _add_and_scale_(y: Tensor, s: Tensor, lora: LoRA, g: Tensor, bias: Tensor | None) -> Tensor:
    """``g ∘ (y + scale · s Bᵀ) + bias``, written over ``y`` and rounded once."""
    wide = torch.promote_types(s.dtype, g.dtype)
    s, B = cast(s, wide), cast(lora.B, wide)
    for block in [slice(None)] if y.dtype is wide else low_rank.blocks(y):
        part = cast(y[block], wide).addmm_(s[block], B.t(), alpha=lora.scale).mul_(g)
        if bias is not None:
            part.add_(bias)
        if part.dtype is not y.dtype:
            y[block] = part
    return y


def _magnitude_grad(dy: Tensor, y: Tensor, bias: Tensor | None, magnitude: Tensor) -> Tensor:
    """``Σ dy ∘ (y - bias) / magnitude``, summed in float32, without a tensor of the size of ``y - bias``."""
    wide = torch.promote_types(magnitude.dtype, torch.float32)
    total = torch.zeros(y.shape[1], dtype=wide, device=y.device)
    for start in starts(y.shape[0], _NORM_ROWS):
        part = cast(y[start : start + _NORM_ROWS], wide)
        if bias is not None:
            part = part - cast(bias, wide)
        total.add_((part * dy[start : start + _NORM_ROWS]).sum(0))
    return cast(total.div_(cast(magnitude, wide)), magnitude.dtype)
