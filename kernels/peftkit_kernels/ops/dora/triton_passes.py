"""The steps of ``dora_norm`` and ``dora_linear`` by Triton kernels around the library's GEMMs."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.low_rank import LoRA, adapter_dtype, cast, passes
from peftkit_kernels.ops.dora.passes import magnitude_grad, weight_norm
from peftkit_kernels.ops.dora.torch_passes import scaled_weight
from peftkit_kernels.ops.dora_scale.passes import scale_forward
from peftkit_kernels.ops.lora_linear.triton_passes import project
from peftkit_kernels.storage.quantized import Weight, decode_triton, dense_triton


class TritonPasses:
    """The steps of ``ops.dora.schedule`` and of ``ops.dora.norm_schedule``."""

    def weight_norm(self, weight: Weight, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """``|W + scale · B A|`` of every row, ``Float32[N]``."""
        return weight_norm(weight, A, B, scale)

    def shrink(self, x: Tensor, lora: LoRA) -> Tensor:
        """``s = drop(x) Aᵀ``, ``[M, R]``."""
        return passes.shrink(x, cast(lora.A, adapter_dtype(x, lora.A)), lora.p, lora.seed)

    def direction(self, x: Tensor, weight: Weight, s: Tensor, lora: LoRA) -> Tensor:
        """``z = x Wᵀ + scale · s Bᵀ``, ``[M, N]``."""
        return project(x, dense_triton(weight, x.dtype), s, cast(lora.B, s.dtype), lora.scale)

    def scale(self, z: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
        """``z ∘ g + bias``, a new tensor."""
        return scale_forward(z, g, bias)

    def folded(
        self, x: Tensor, weight: Weight, s: Tensor, lora: LoRA, g: Tensor, bias: Tensor | None
    ) -> Tensor:
        """``x (g W)ᵀ + scale · s (g B)ᵀ + bias``."""
        B = cast(lora.B * g[:, None], s.dtype)
        return project(
            x, scaled_weight(weight, g, x.dtype, decode_triton), s, B, lora.scale, bias=bias
        )

    def scaled_in_place(
        self, x: Tensor, weight: Tensor, s: Tensor, lora: LoRA, g: Tensor, bias: Tensor | None
    ) -> Tensor:
        """``g ∘ (x Wᵀ + scale · s Bᵀ) + bias``."""
        y = project(x, weight, s, cast(lora.B, s.dtype), lora.scale)
        return y.mul_(g) if bias is None else torch.addcmul(bias, y, g, out=y)

    def grad_magnitude(
        self, dy: Tensor, y: Tensor, bias: Tensor | None, magnitude: Tensor
    ) -> Tensor:
        """``Σ dy ∘ (y - bias) / magnitude``."""
        return magnitude_grad(dy, y, bias, magnitude, magnitude.dtype)

    def grad_magnitude_of_direction(
        self, dy: Tensor, z: Tensor, norm: Tensor, magnitude: Tensor
    ) -> Tensor:
        """``Σ dy ∘ z / norm`` in the dtype of the magnitude."""
        return magnitude_grad(dy, z, None, cast(norm, torch.float32), magnitude.dtype)

    def grads_at_output(
        self, dy: Tensor, s: Tensor | None, lora: LoRA, g: Tensor, needs_ds: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradient of B if ``s`` is given, and ``ds = scale · dy (g B)`` if it is needed."""
        dB = ds = None
        # B takes the rows' factors, so that ds needs no scaled copy of dy
        B = cast(lora.B * g[:, None], adapter_dtype(dy, lora.A)) if needs_ds else None
        if s is not None and B is not None:
            dB, ds = passes.grad_b_and_s(dy, s, B, lora.scale, torch.float32)
        elif s is not None:
            dB = passes.grad_b(dy, s, lora.scale, torch.float32)
        elif B is not None:
            ds = passes.grad_s(dy, B, lora.scale)
        return None if dB is None else cast(dB.mul_(g[:, None]), lora.B.dtype), ds

    def grad_a(self, x: Tensor, ds: Tensor, lora: LoRA) -> Tensor:
        """``dA = dsᵀ drop(x)``."""
        return passes.grad_a(ds, x, lora.A.dtype, lora.p, lora.seed)

    def grad_x(
        self, dy: Tensor, weight: Weight, g: Tensor, ds: Tensor, lora: LoRA, *, folded: bool
    ) -> Tensor:
        """``dx = (dy ∘ g) W + mask ∘ (ds A)``; ``g`` multiplies the rows of ``W`` if it is folded into them."""
        if folded:
            full = scaled_weight(weight, g, dy.dtype, decode_triton)
        else:
            dy, full = scale_forward(dy, g, None), dense_triton(weight, dy.dtype)
        A = cast(lora.A, adapter_dtype(dy, lora.A)).t()
        return project(dy, full.t(), ds, A, 1.0, p=lora.p, seed=lora.seed)
