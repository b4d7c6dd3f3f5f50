"""The rotation of queries and keys, with the norms of their heads: functions that allocate, choose a configuration and launch."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkit_kernels.core.launch import cdiv, launch
from peftkit_kernels.low_rank import rows
from peftkit_kernels.ops.lora_decoder_layer.config import RotateConfig


@functools.cache
def _kernels() -> Any:
    from peftkit_kernels.ops.lora_decoder_layer import kernels

    return kernels


class HeadNorms(NamedTuple):
    """The norms of each head of the queries and of the keys before the rotation.

    Attributes:
        q: ``[head size]``.
        k: ``[head size]``.
        eps: As in ``Norm``, as are the others; they are those of both norms.
        offset: Added to the weights.
        round_first: Whether the normalised value is rounded before it is multiplied.
    """

    q: Tensor
    k: Tensor
    eps: float
    offset: float
    round_first: bool


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norms: HeadNorms | None = None
) -> tuple[Tensor, Tensor]:
    """Each head of ``q [B, S, Hq D]`` and ``k [B, S, Hk D]`` rotated: in place, or with ``norms`` normalised first, into new tensors.

    Args:
        q: Queries. Their rows may have any stride.
        k: Keys, as ``q``.
        cos: ``[B or 1, S, D]``.
        sin: As ``cos``.
        norms: The norms of the heads, or ``None``.
    """
    if norms is None:
        _launch_rotation(q, k, cos, sin, None, None, None, inverse=False)
        return q, k
    out_q, out_k = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k))
    _launch_rotation(out_q, out_k, cos, sin, q, k, norms, inverse=False)
    return out_q, out_k


def rotate_back_(
    dq: Tensor,
    dk: Tensor,
    cos: Tensor,
    sin: Tensor,
    raw_q: Tensor | None = None,
    raw_k: Tensor | None = None,
    norms: HeadNorms | None = None,
) -> None:
    """Turn the gradients of what ``rotate`` returns into those of its arguments ``raw_q`` and ``raw_k``, in place."""
    _launch_rotation(dq, dk, cos, sin, raw_q, raw_k, norms, inverse=True)


def _launch_rotation(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    raw_q: Tensor | None,
    raw_k: Tensor | None,
    norms: HeadNorms | None,
    *,
    inverse: bool,
) -> None:
    S, D = q.shape[1], cos.shape[2]
    flat = [rows(t) for t in (q, k)]
    raw = [None if t is None else rows(t) for t in (raw_q, raw_k)]
    M, heads = flat[0].shape[0], [t.shape[1] // D for t in flat]
    c = RotateConfig.choose(D, norm=norms is not None)
    batch = [0 if t.shape[0] == 1 else t.stride(0) for t in (cos, sin)]
    weights = (None, None) if norms is None else (norms.q, norms.k)
    numbers = (0.0, 0.0) if norms is None else (norms.eps, norms.offset)
    launch(
        _kernels().rotate_kernel,
        (cdiv(M, c.block_m), sum(heads)),
        *(*flat, cos, sin, *raw, *weights, *numbers, M, S, heads[0], D),
        *(t.stride(0) for t in flat),
        *(0 if t is None else t.stride(0) for t in raw),
        *(batch[0], cos.stride(1), batch[1], sin.stride(1)),
        NORM=norms is not None,
        HAS_OFFSET=norms is not None and norms.offset != 0.0,
        ROUND_FIRST=norms is not None and norms.round_first,
        INVERSE=inverse,
        BLOCK_M=c.block_m,
        BLOCK_H=c.block_h,
        num_warps=c.num_warps,
        num_stages=1,
    )
