"""Linears on quantised weights: decode into the workspace, then run the schedule of ``lora_linear``. The backward decodes again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkit_kernels import low_rank
from peftkit_kernels.core import recompute
from peftkit_kernels.core.autograd import once_differentiable
from peftkit_kernels.gemm import matmul_nn
from peftkit_kernels.low_rank import rows
from peftkit_kernels.ops.lora_linear.torch_impl import add_update_grad, project, unflatten
from peftkit_kernels.ops.lora_qkv.torch_impl import Numbers, make_loras
from peftkit_kernels.storage.quantized import QuantizedWeight, decode


class QuantizedLinear(torch.autograd.Function):
    """The chain rule of ``lora_linear``. Only the stored weight is kept; the decoded weight is never saved."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        q: QuantizedWeight,
        bias: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        numbers: Numbers | None,
    ) -> Tensor:
        (lora,) = make_loras([A], [B], [numbers])
        flat = rows(x)
        s = None if lora is None else low_rank.shrink(flat, lora.A, lora.p, lora.seed)
        y = project(flat, decode(q, x.dtype), bias, s, lora)
        _, _, _, needs_A, needs_B, _ = ctx.needs_input_grad
        ctx.recompute_x, x_parts = recompute.saved_for(x, needs_A)
        ctx.save_for_backward(A, B, s if needs_B else None, *x_parts)
        ctx.q, ctx.numbers, ctx.shape = q, numbers, x.shape
        return unflatten(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        A, B, s, *x_parts = ctx.saved_tensors
        (lora,) = make_loras([A], [B], [ctx.numbers])
        needs_x, _, needs_bias, needs_A, needs_B, _ = ctx.needs_input_grad
        dy = rows(dy)
        dbias = dy.sum(0) if needs_bias else None
        dx = dA = dB = None
        if needs_x:
            dx = matmul_nn(dy, decode(ctx.q, dy.dtype))
        if lora is not None:
            if needs_B:
                dB = low_rank.grad_b(dy, s, lora.scale, lora.B)
            if needs_x or needs_A:
                ds = low_rank.grad_s(dy, lora.B, lora.scale)
            if needs_A:
                x = recompute.restore(ctx.recompute_x, x_parts)
                dA = low_rank.grad_a(ds, rows(x), lora.A.dtype, lora.p, lora.seed)
            if needs_x:
                dx = add_update_grad(dx, ds, lora)
        return None if dx is None else dx.view(ctx.shape), None, dbias, dA, dB, None
