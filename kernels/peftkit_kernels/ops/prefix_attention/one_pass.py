"""Attention with a prefix as one pass of the native library, which processes the prefix before the other keys."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from peftkit_kernels import native
from peftkit_kernels.core.autograd import gradients_of
from peftkit_kernels.core.modes import hides_native_calls
from peftkit_kernels.low_rank import cast
from peftkit_kernels.ops.prefix_attention.flash import over_batch
from peftkit_kernels.ops.prefix_attention.reference import prefix_attention_reference


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    gate: Tensor | None,
    mask: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """The output ``[B, S, H, D]``, and the log-sum-exps of its parts. Arguments as ``prefix_attention``."""
    before = _contiguous(prefix_k, prefix_v, gate, q.dtype)
    return native.attention(q, k, v, scale, causal, mask, *before)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    gate: Tensor | None,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients of the six tensors before the mask; ``out`` and ``lse`` are those that ``forward`` has returned."""
    # the forward ran native code, but the backward may run inside a mode that would miss it
    if hides_native_calls():
        tensors = q, k, v, prefix_k, prefix_v, *(() if gate is None else (gate,))
        definition = partial(_definition, scale=scale, causal=causal, mask=mask)
        return (*gradients_of(definition, tensors, dout), None)[:6]
    before = _contiguous(prefix_k, prefix_v, gate, q.dtype)
    dq, dk, dv, *parts = native.attention_backward(
        *(dout.contiguous(), q, k, v, out, lse, scale, causal, mask, *before)
    )
    of_prefix = zip(parts, (prefix_k, prefix_v, gate), strict=False)
    grads = [over_batch(part, t) for part, t in of_prefix if t is not None]
    return dq, dk, dv, *(*grads, None)[:3]


def _definition(*tensors: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    gate = tensors[5] if len(tensors) > 5 else None
    return prefix_attention_reference(*tensors[:5], scale, causal=causal, mask=mask, gate=gate)


def _contiguous(
    prefix_k: Tensor, prefix_v: Tensor, gate: Tensor | None, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    k, v = (cast(t, dtype).contiguous() for t in (prefix_k, prefix_v))
    return (k, v), None if gate is None else cast(gate, dtype).contiguous()
