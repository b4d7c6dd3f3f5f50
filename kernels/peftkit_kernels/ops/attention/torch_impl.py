"""``attention`` in native code: keeps q, k, v, the output and one number for each row of scores."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels import native
from peftkit_kernels.core.autograd import gradients_of, once_differentiable
from peftkit_kernels.core.modes import hides_native_calls
from peftkit_kernels.ops.attention.reference import attention_reference


class Attention(torch.autograd.Function):
    """With ``P = softmax(scale q kᵀ)`` and ``dS = P ∘ (dout vᵀ - rowsum(dout ∘ out))``:

    ``dv = Pᵀ dout``, ``dk = scale dSᵀ q``, ``dq = scale dS k``. P is recomputed from the kept log-sum-exp.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
    ) -> Tensor:
        out, lse = native.attention(q, k, v, scale, causal, mask)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.scale, ctx.causal = scale, causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, lse = ctx.saved_tensors
        # the forward ran native code, but the backward may run inside a mode that would miss it
        if hides_native_calls():
            grads = gradients_of(
                partial(attention_reference, scale=ctx.scale, causal=ctx.causal, mask=mask),
                (q, k, v),
                dout,
            )
            return *grads, None, None, None
        dout = dout.contiguous()
        grads = native.attention_backward(dout, q, k, v, out, lse, ctx.scale, ctx.causal, mask)
        return *grads, None, None, None
