"""The definition of ``grouped_lora``: every row is multiplied with the factors of its adapter."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.low_rank import adapter_dtype


def grouped_lora_reference(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: Tensor,
    ids: Tensor,
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """``y[m] + scale[e] · B[e] A[e] x[m]`` with ``e = ids[m]``, and ``y[m]`` if that is -1.

    Args:
        y: ``[..., N]``.
        x: ``[..., K]``.
        A: ``[E, R, K]``.
        B: ``[E, N, R]``.
        scale: ``Float[E]``.
        ids: ``Int[M]``, one for each row.
        compute_dtype: Dtype of every product (default: ``low_rank.adapter_dtype``).

    Returns:
        ``[..., N]`` in ``compute_dtype`` or the dtype of ``y``.
    """
    dtype = compute_dtype or adapter_dtype(x, A)
    own, rows = ids.clamp(min=0), x.to(dtype).reshape(-1, x.shape[-1])
    # indexing happens in float32, so that autograd does not sum the gradients of the factors in 16 bits
    summed = torch.promote_types(dtype, torch.float32)
    own_A, own_B = (factor.to(summed)[own].to(dtype) for factor in (A, B))
    s = torch.einsum("mk,mrk->mr", rows, own_A)
    update = torch.einsum("mr,mnr->mn", s, own_B) * scale.to(dtype)[own, None]
    # not a product with 0, because the update of a row without an adapter may be NaN or infinite
    update = update.masked_fill((ids < 0)[:, None], 0.0)
    return (y.to(dtype) + update.reshape(y.shape)).to(compute_dtype or y.dtype)
