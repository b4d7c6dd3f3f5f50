"""``prefix_attention`` as two flash passes, or as one native pass over both parts. Keys and scores are never concatenated."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels import native
from peftkit_kernels.core.autograd import gradients_of, once_differentiable
from peftkit_kernels.core.modes import hides_native_calls
from peftkit_kernels.low_rank import cast
from peftkit_kernels.ops.prefix_attention.flash import Pass, of_batch, over_batch
from peftkit_kernels.ops.prefix_attention.reference import prefix_attention_reference


class PrefixAttention(torch.autograd.Function):
    """With ``L = log(exp(l1) + exp(l2))``: ``out = o1 exp(l1 - L) + o2 exp(l2 - L)``.

    The probabilities of both parts are ``exp(scores - L)``, so the backward of each pass gets ``out`` and ``L`` and returns
    its part of the gradient; the two ``dq`` are added. With a gate ``out = o1 + g o2``, each pass has its own log-sum-exp, and
    ``dg = Σ dout ∘ o2``. The native library needs one pass, which processes the prefix before the other keys.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor,
        prefix_v: Tensor,
        gate: Tensor | None,
        mask: Tensor | None,
        scale: float,
        causal: bool,
    ) -> Tensor:
        one = Pass(scale, causal, mask).is_native(q, k, v)
        ctx.scale, ctx.causal, ctx.one = scale, causal, one
        if one:
            before = _contiguous(prefix_k, prefix_v, gate, q.dtype)
            out, lse = native.attention(q, k, v, scale, causal, mask, *before)
            ctx.save_for_backward(q, k, v, prefix_k, prefix_v, gate, mask, out, lse)
            return out
        o1, l1 = Pass(scale, causal, mask).forward(q, k, v)
        o2, l2 = Pass(scale).forward(q, of_batch(prefix_k, q), of_batch(prefix_v, q))
        if gate is None:
            total = torch.logaddexp(l1, l2)
            out = _weighted(o1, _columns(l1 - total), o2, _columns(l2 - total))
            kept = (out, total)
        else:
            wide = cast(gate, torch.promote_types(gate.dtype, l1.dtype))
            out = (o1 + o2 * wide[:, None]).to(q.dtype)
            kept = (o1, l1, o2, l2)
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, gate, mask, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, prefix_k, prefix_v, gate, mask, *kept = ctx.saved_tensors
        # the forward ran native code, but the backward may run inside a mode that would miss it
        if ctx.one and hides_native_calls():
            tensors = q, k, v, prefix_k, prefix_v, *(() if gate is None else (gate,))
            grads = gradients_of(partial(_reference, ctx, mask), tensors, dout)
            return *(*grads, None)[:6], None, None, None
        dout, dgate = dout.contiguous(), None
        if ctx.one:
            before = _contiguous(prefix_k, prefix_v, gate, q.dtype)
            dq, dk, dv, *parts = native.attention_backward(
                *(dout, q, k, v, *kept, ctx.scale, ctx.causal, mask, *before)
            )
            of_prefix = zip(parts, (prefix_k, prefix_v, gate), strict=False)
            grads = [over_batch(part, t) for part, t in of_prefix if t is not None]
            return dq, dk, dv, *(*grads, None)[:3], None, None, None
        to_prefix, (o1, l1), (o2, l2) = dout, kept[:2], kept[-2:]
        if gate is not None:
            wide = cast(gate, torch.promote_types(gate.dtype, l1.dtype))
            to_prefix = (dout * wide[:, None]).to(dout.dtype)
            dgate = (dout.to(wide.dtype) * o2).sum((0, 1, 3)).to(gate.dtype)
            # a query may see only the prefix, and exp(scores - l1) must not become NaN then
            l1 = l1.masked_fill(l1 == -torch.inf, 0.0)
        before = of_batch(prefix_k, q), of_batch(prefix_v, q)
        dq, dk, dv = Pass(ctx.scale, ctx.causal, mask).backward(dout, q, k, v, o1, l1)
        more, dprefix_k, dprefix_v = Pass(ctx.scale).backward(to_prefix, q, *before, o2, l2)
        return (
            *(dq.add_(more), dk, dv),
            *(over_batch(dprefix_k, prefix_k), over_batch(dprefix_v, prefix_v)),
            *(dgate, None, None, None),
        )


def _reference(ctx: Any, mask: Tensor | None, *tensors: Tensor) -> Tensor:
    gate = tensors[5] if len(tensors) > 5 else None
    return prefix_attention_reference(
        *tensors[:5], ctx.scale, causal=ctx.causal, mask=mask, gate=gate
    )


def _contiguous(
    prefix_k: Tensor, prefix_v: Tensor, gate: Tensor | None, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    k, v = (cast(t, dtype).contiguous() for t in (prefix_k, prefix_v))
    return (k, v), None if gate is None else cast(gate, dtype).contiguous()


def _columns(log_weight: Tensor) -> Tensor:
    """``exp`` of ``[B, H, S]`` as ``[B, S, H, 1]``."""
    return log_weight.exp().transpose(1, 2)[..., None]


def _weighted(o1: Tensor, w1: Tensor, o2: Tensor, w2: Tensor) -> Tensor:
    """``o1 w1 + o2 w2`` in the dtype of ``o1``; ``o1`` may be overwritten."""
    if o1.dtype is w1.dtype:
        return o1.mul_(w1).addcmul_(o2, w2)
    return (o1 * w1).addcmul_(o2, w2).to(o1.dtype)
