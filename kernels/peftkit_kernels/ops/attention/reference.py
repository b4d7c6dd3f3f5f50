"""The definition of ``attention``."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """``softmax(scale q kᵀ) v`` over the keys a query may see; arguments as ``attention``, result ``[B, S, H, D]``."""
    dtype = compute_dtype or q.dtype
    q, k, v = (t.to(dtype) for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    hidden = torch.zeros(scores.shape[2:], dtype=torch.bool, device=q.device)
    if causal:
        hidden = torch.ones_like(hidden).triu(1)
    if mask is not None:
        hidden = hidden | ~mask
    scores = scores.masked_fill(hidden, -torch.inf)
    # the output of a query that sees no key is 0, not the NaN of an empty softmax
    sees_none = hidden.all(-1, keepdim=True)
    probabilities = scores.masked_fill(sees_none, 0.0).softmax(-1).masked_fill(sees_none, 0.0)
    return (probabilities @ v).transpose(1, 2)
