"""The pass over rows of logits by a Triton kernel: loss of each row, and its gradient written over the logits."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core.launch import launch
from peftkit_kernels.ops.linear_cross_entropy.config import RowConfig
from peftkit_kernels.ops.linear_cross_entropy.reference import RowLoss


@functools.cache
def _kernels() -> Any:
    from peftkit_kernels.ops.linear_cross_entropy import kernels

    return kernels


def xent_rows_triton_(
    z: Tensor,
    target: Tensor,
    row_loss: RowLoss,
    *,
    want_grad: bool,
    factor: Tensor | None = None,
    vocabulary: int | None = None,
    config: RowConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """One pass over a chunk of raw logits. Every logit is read twice (the second time from L2) and written once.

    Args:
        z: ``[C, W]``; the first V columns are logits, the others are padding with any values. With ``want_grad`` the logits
            are overwritten by ``factor · dloss/dz``, otherwise they are not changed.
        target: ``Int64[C]``. A row whose target is outside [0, V) has loss and gradient 0.
        row_loss: The loss of one row.
        want_grad: Whether the gradient is needed.
        factor: ``Float32[C]``, for each row a factor on the gradient; ``None`` means 1.
        vocabulary: V; ``None`` means W.
        config: Replaces the configuration that would be chosen.

    Returns:
        ``(loss, lse)``, both ``Float32[C]``.
    """
    (C, W), capped = z.shape, row_loss.softcap is not None
    V = W if vocabulary is None else vocabulary
    loss, lse = (torch.empty(C, dtype=torch.float32, device=z.device) for _ in range(2))
    if not C:
        return loss, lse
    c = config or RowConfig.choose(V, capped=capped)
    launch(
        _kernels().xent_kernel,
        (C,),
        *(z, target, factor, loss, lse, V, W, z.stride(0), row_loss.logit_scale),
        *(row_loss.softcap or 1.0, row_loss.label_smoothing, row_loss.z_loss),
        GRAD=want_grad,
        HAS_FACTOR=factor is not None,
        CAP=capped,
        SMOOTH=row_loss.label_smoothing > 0,
        Z_LOSS=row_loss.z_loss != 0,
        BLOCK_V=c.block_v,
        num_warps=c.num_warps,
        num_stages=1,
    )
    return loss, lse
