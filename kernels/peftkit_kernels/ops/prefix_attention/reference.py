"""The definition of ``prefix_attention``: the prefix is concatenated before the keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.ops.attention.reference import attention_reference


def prefix_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    gate: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """``softmax(scale q [prefix_k; k]ᵀ) [prefix_v; v]``, or with a gate the two parts each with its own softmax.

    Arguments as ``prefix_attention``, result ``[B, S, H, D]`` in ``compute_dtype`` (default: that of ``q``).
    """
    dtype = compute_dtype or q.dtype
    before = [t.to(dtype).expand(q.shape[0], *t.shape) for t in (prefix_k, prefix_v)]
    options = {"compute_dtype": compute_dtype}
    if gate is not None:
        own = attention_reference(q, k, v, scale, causal=causal, mask=mask, **options)
        return own + gate.to(dtype)[:, None] * attention_reference(q, *before, scale, **options)
    keys, values = (torch.cat([p, t.to(dtype)], 2) for p, t in zip(before, (k, v), strict=True))
    visible = _visible(q, k, causal, mask)
    if visible is not None:
        visible = torch.nn.functional.pad(visible, (prefix_k.shape[1], 0), value=True)
    return attention_reference(q, keys, values, scale, mask=visible, **options)


def _visible(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> Tensor | None:
    """``Bool[B, 1, S, T]``: which keys, besides the prefix, a query may see; ``None`` means all."""
    if not causal:
        return mask
    B, S, T = q.shape[0], q.shape[2], k.shape[2]
    triangle = torch.ones(S, T, dtype=torch.bool, device=q.device).tril()
    return triangle.expand(B, 1, S, T) if mask is None else triangle & mask
