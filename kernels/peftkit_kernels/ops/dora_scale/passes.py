"""Launches of the kernels of ``dora_scale`` and ``dora_gate``, one each way."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core.launch import cdiv, launch, target_of
from peftkit_kernels.low_rank import rows
from peftkit_kernels.low_rank.passes import add_up, readable
from peftkit_kernels.ops.dora_scale.config import BackwardConfig, ForwardConfig

Tensors = Sequence[Tensor | None]


@functools.cache
def _kernels() -> Any:
    from peftkit_kernels.ops.dora_scale import kernels

    return kernels


def scale_forward(z: Tensor, g: Tensor | None, bias: Tensor | None) -> Tensor:
    """``z ∘ g + bias`` in the shape and dtype of ``z [..., N]``."""
    y = _like(z)
    if not z.numel():
        return y
    flat, out, c = readable(rows(z)), rows(y), ForwardConfig()
    M, N = flat.shape
    launch(
        _kernels().scale_kernel,
        (cdiv(M, c.block_m) * cdiv(N, c.block_n),),
        *(flat, _columns(g), _columns(bias), out, M, N, flat.stride(0), out.stride(0)),
        HAS_G=g is not None,
        HAS_BIAS=bias is not None,
        BLOCK_M=c.block_m,
        BLOCK_N=c.block_n,
        num_warps=c.num_warps,
        num_stages=1,
    )
    return y


def scale_backward(
    dy: Tensor, z: Tensor | None, g: Tensor | None, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``dz = dy ∘ g`` if ``g`` is given, and the requested sums, ``Float32[sums, N]``, if there are any.

    Args:
        dy: ``[..., N]``.
        z: As in the forward, to request ``Σ dy ∘ z``; else ``None``.
        g: As in the forward, to request ``dz``; else ``None``.
        needs_bias: Whether to compute ``Σ dy``.
    """
    dz, sums = None if g is None else _like(dy), sums_like(dy, (z is not None) + needs_bias)
    flat_dz = None if dz is None else rows(dz)
    flat_z, flat = None if z is None else readable(rows(z)), readable(rows(dy))
    M, N = flat.shape
    c = BackwardConfig.choose("dora_scale", M, N, target=target_of(dy))
    chunks = cdiv(M, c.chunk_m)
    partial = _partial(sums, chunks)
    launch(
        _kernels().scale_backward_kernel,
        (chunks * cdiv(N, c.block_n),),
        *(flat, flat_z, _columns(g), flat_dz, partial, M, N, c.chunk_m),
        *(flat.stride(0), _row_stride(flat_z), _row_stride(flat_dz)),
        DZ=g is not None,
        DG=z is not None,
        DBIAS=needs_bias,
        BLOCK_M=c.block_m,
        BLOCK_N=c.block_n,
        num_warps=c.num_warps,
        num_stages=1,
    )
    _add_up(partial, sums)
    return dz, sums


def gate_forward(
    z_gate: Tensor,
    z_up: Tensor,
    g_gate: Tensor | None,
    g_up: Tensor | None,
    bias_gate: Tensor | None,
    bias_up: Tensor | None,
    act: str,
) -> Tensor:
    """``act(z_gate ∘ g_gate + bias_gate) ∘ (z_up ∘ g_up + bias_up)`` in the shape and dtype of ``z_gate [..., F]``."""
    h = _like(z_gate)
    if not z_gate.numel():
        return h
    flat_gate, flat_up, out = readable(rows(z_gate)), readable(rows(z_up)), rows(h)
    (M, F), c = flat_gate.shape, ForwardConfig()
    launch(
        _kernels().scaled_gate_kernel,
        (cdiv(M, c.block_m) * cdiv(F, c.block_n),),
        *(flat_gate, flat_up, *(_columns(t) for t in (g_gate, g_up, bias_gate, bias_up)), out),
        *(M, F, flat_gate.stride(0), flat_up.stride(0), out.stride(0)),
        **_present((g_gate, g_up), (bias_gate, bias_up)),
        ACT=act,
        BLOCK_M=c.block_m,
        BLOCK_F=c.block_n,
        num_warps=c.num_warps,
        num_stages=1,
    )
    return h


def gate_backward(
    dh: Tensor,
    z_gate: Tensor,
    z_up: Tensor,
    g_gate: Tensor | None,
    g_up: Tensor | None,
    bias_gate: Tensor | None,
    bias_up: Tensor | None,
    act: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of ``z_gate`` and ``z_up``, and those of ``g_gate``, ``g_up`` and the two biases that ``needs`` selects.

    Returns:
        ``[..., F]`` twice; and ``Float32[sums, F]``, one row for each selected sum, if there are any.
    """
    dz_gate, dz_up, sums = _like(dh), _like(dh), sums_like(dh, sum(needs))
    flat, flat_gate, flat_up = (readable(rows(t)) for t in (dh, z_gate, z_up))
    M, F = flat.shape
    c = BackwardConfig.choose("dora_gate", M, F, target=target_of(dh))
    chunks = cdiv(M, c.chunk_m)
    partial = _partial(sums, chunks)
    launch(
        _kernels().scaled_gate_backward_kernel,
        (chunks * cdiv(F, c.block_n),),
        *(flat, flat_gate, flat_up, *(_columns(t) for t in (g_gate, g_up, bias_gate, bias_up))),
        *(rows(dz_gate), rows(dz_up), partial, M, F, c.chunk_m),
        *(flat.stride(0), flat_gate.stride(0), flat_up.stride(0), rows(dz_gate).stride(0)),
        **_present((g_gate, g_up), (bias_gate, bias_up)),
        **dict(zip(("DG_GATE", "DG_UP", "DBIAS_GATE", "DBIAS_UP"), needs, strict=True)),
        ACT=act,
        BLOCK_M=c.block_m,
        BLOCK_F=c.block_n,
        num_warps=c.num_warps,
        num_stages=1,
    )
    _add_up(partial, sums)
    return dz_gate, dz_up, sums


def _like(t: Tensor) -> Tensor:
    """An uninitialised contiguous tensor with the shape and dtype of ``t``."""
    return t.new_empty(t.shape)


def _columns(t: Tensor | None) -> Tensor | None:
    return None if t is None else readable(t)


def _row_stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _present(gs: Tensors, biases: Tensors) -> dict[str, bool]:
    names = "HAS_G_GATE", "HAS_G_UP", "HAS_BIAS_GATE", "HAS_BIAS_UP"
    return {name: t is not None for name, t in zip(names, (*gs, *biases), strict=True)}


def _partial(sums: Tensor | None, chunks: int) -> Tensor | None:
    """The tensor for the sums of the chunks of rows: ``sums`` itself if there is one chunk."""
    if sums is None or chunks == 1:
        return sums
    return sums.new_empty(chunks, *sums.shape)


def _add_up(partial: Tensor | None, sums: Tensor | None) -> None:
    if partial is not None and sums is not None and partial is not sums:
        add_up(partial, sums)


def sums_like(like: Tensor, count: int) -> Tensor | None:
    """``count`` uninitialised sums over the rows of a tensor, ``Float32[count, N]``, if there are any."""
    return like.new_empty(count, like.shape[-1], dtype=torch.float32) if count else None
