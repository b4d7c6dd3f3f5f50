"""The merge of two attention parts, and the gradient of a gate, by Triton kernels."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core.launch import cdiv, launch
from peftkit_kernels.low_rank import cast
from peftkit_kernels.ops.prefix_attention.config import MergeConfig


@functools.cache
def _kernels() -> Any:
    from peftkit_kernels.ops.prefix_attention import kernels

    return kernels


def merge(
    o1: Tensor, l1: Tensor, o2: Tensor, l2: Tensor, *, config: MergeConfig | None = None
) -> tuple[Tensor, Tensor]:
    """The output ``[B, S, H, D]`` and the log-sum-exp ``[B, H, S]`` over all keys, from those of the two parts."""
    o1, l1, o2, l2 = (t.contiguous() for t in (o1, l1, o2, l2))
    out, total = torch.empty_like(o1), torch.empty_like(l1)
    _launch(_kernels().merge_kernel, o1, config, o1, o2, l1, l2, None, out, total, HAS_GATE=False)
    return out, total


def add_gated(o1: Tensor, o2: Tensor, gate: Tensor, *, config: MergeConfig | None = None) -> Tensor:
    """``o1 + gate · o2``, ``[B, S, H, D]``, for ``gate [H]``."""
    o1, o2 = o1.contiguous(), o2.contiguous()
    out, none = torch.empty_like(o1), None
    _launch(
        *(_kernels().merge_kernel, o1, config, o1, o2, none, none, gate, out, none), HAS_GATE=True
    )
    return out


def gate_grad(
    dout: Tensor, o2: Tensor, gate: Tensor, *, config: MergeConfig | None = None
) -> tuple[Tensor, Tensor]:
    """``gate · dout``, ``[B, S, H, D]``, and ``dgate = Σ dout ∘ o2``, ``[H]``, in one pass; partial sums are added in a fixed order."""
    B, S, H, D = dout.shape
    c = config or MergeConfig.choose(D)
    dout, o2 = dout.contiguous(), o2.contiguous()
    do2 = torch.empty_like(dout)
    partial = dout.new_empty(cdiv(S, c.block_s), B, H, dtype=torch.float32)
    _launch(_kernels().gate_grad_kernel, dout, c, dout, o2, gate, do2, partial)
    return do2, cast(partial.sum((0, 1)), gate.dtype)


def _launch(
    kernel: Any, like: Tensor, config: MergeConfig | None, *tensors: Tensor | None, **flags: bool
) -> None:
    """Launch one program for every head and block of positions of ``like [B, S, H, D]``."""
    B, S, H, D = like.shape
    c = config or MergeConfig.choose(D)
    launch(
        kernel,
        (B * H, cdiv(S, c.block_s)),
        *(*tensors, S, H, D),
        **flags,
        BLOCK_S=c.block_s,
        BLOCK_D=c.block_d,
        num_warps=4,
        num_stages=1,
    )
