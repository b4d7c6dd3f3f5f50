"""``int8_compute_linear`` from torch ops: the 8-bit products of ``storage.int8.product``, and the passes of ``lora_linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkit_kernels import low_rank
from peftkit_kernels.core import recompute
from peftkit_kernels.core.autograd import once_differentiable
from peftkit_kernels.low_rank import cast, rows
from peftkit_kernels.ops.lora_linear.torch_impl import add_update_grad, unflatten
from peftkit_kernels.ops.lora_qkv.torch_impl import Numbers, make_loras
from peftkit_kernels.storage.int8 import Int8Weight
from peftkit_kernels.storage.int8.product.torch_impl import (
    epilogue,
    frozen_product,
    product,
    quantize,
)


class Int8ComputeLinear(torch.autograd.Function):
    """With ``s = drop(x) Aᵀ``, ``ds = scale · dy B`` and ``(g8, sg)`` the codes and steps of ``dy ∘ sw`` by rows:

    ``dB = scale · dyᵀ s``, ``dA = dsᵀ drop(x)``, ``dx = sg · g8 W8 + mask ∘ (ds A)``, ``dbias = Σ dy``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        q: Int8Weight,
        bias: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        numbers: Numbers | None,
        threshold: float | None,
    ) -> Tensor:
        (lora,) = make_loras([A], [B], [numbers])
        flat = rows(x)
        s = t = None
        if lora is not None:
            s = low_rank.shrink(flat, lora.A, lora.p, lora.seed)
            t = cast(lora.B, torch.promote_types(s.dtype, torch.float32)).t() * lora.scale
        y = frozen_product(flat, q, bias, s, t, threshold)
        _, _, _, needs_A, needs_B, _, _ = ctx.needs_input_grad
        ctx.recompute_x, x_parts = recompute.saved_for(x, needs_A)
        ctx.save_for_backward(A, B, s if needs_B else None, *x_parts)
        ctx.q, ctx.numbers, ctx.shape = q, numbers, x.shape
        return unflatten(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        A, B, s, *x_parts = ctx.saved_tensors
        (lora,) = make_loras([A], [B], [ctx.numbers])
        needs_x, _, needs_bias, needs_A, needs_B, _, _ = ctx.needs_input_grad
        dy = rows(dy)
        dbias = dy.sum(0) if needs_bias else None
        dx = dA = dB = ds = None
        if lora is not None and needs_B:
            dB = low_rank.grad_b(dy, s, lora.scale, lora.B)
        if lora is not None and (needs_x or needs_A):
            ds = low_rank.grad_s(dy, lora.B, lora.scale)
        if needs_A:
            x = recompute.restore(ctx.recompute_x, x_parts)
            dA = low_rank.grad_a(ds, rows(x), lora.A.dtype, lora.p, lora.seed)
        if needs_x:
            dx = _input_grad(dy, ctx.q, ds, lora).view(ctx.shape)
        return dx, None, dbias, dA, dB, None, None


def _input_grad(dy: Tensor, q: Int8Weight, ds: Tensor | None, lora: Any) -> Tensor:
    """``sg · g8 W8 + mask ∘ (ds A)``."""
    codes, step = quantize(dy.contiguous(), q.row_scale())
    acc = product(codes, q.codes)
    if lora is None or lora.p == 0.0:
        t = None if lora is None else lora.A
        return epilogue(acc, step, None, None, ds, t, dy.dtype)
    # the mask applies to ds A alone, so the epilogue cannot add it
    return add_update_grad(epilogue(acc, step, None, None, None, None, dy.dtype), ds, lora)
