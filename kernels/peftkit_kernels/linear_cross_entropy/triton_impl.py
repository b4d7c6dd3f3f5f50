"""The pass over a chunk of logits as one Triton kernel; the sweep over the chunks is that of ``torch_impl``."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.launch import launch
from peftkit_kernels.linear_cross_entropy.config import RowConfig
from peftkit_kernels.linear_cross_entropy.reference import RowLoss


@functools.cache
def _kernels() -> Any:
    from peftkit_kernels.linear_cross_entropy import kernels

    return kernels


def xent_rows_triton_(
    z: Tensor,
    target: Tensor,
    row_loss: RowLoss,
    *,
    ignored: Tensor | None,
    want_grad: bool,
    config: RowConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``torch_impl.xent_rows_``: every logit is read twice (once from L2) and written once, nothing else is allocated."""
    (C, V), capped = z.shape, row_loss.softcap is not None
    loss, lse = (torch.empty(C, dtype=torch.float32, device=z.device) for _ in range(2))
    if not C:
        return loss, lse
    c = config or RowConfig.choose(V, capped=capped)
    counted = target if ignored is None else target.masked_fill(ignored, -1)
    launch(
        _kernels().xent_kernel,
        (C,),
        *(z, counted, loss, lse, V, z.stride(0), row_loss.logit_scale),
        *(row_loss.softcap or 1.0, row_loss.label_smoothing, row_loss.z_loss),
        GRAD=want_grad,
        CAP=capped,
        SMOOTH=row_loss.label_smoothing > 0,
        Z_LOSS=row_loss.z_loss != 0,
        BLOCK_V=c.block_v,
        num_warps=c.num_warps,
        num_stages=1,
    )
    return loss, lse
