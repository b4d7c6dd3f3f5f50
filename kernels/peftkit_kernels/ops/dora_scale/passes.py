"""DoRA's magnitude by one Triton kernel each way, as torch.library ops: traceable, and differentiable once.

The ops take ``g = magnitude / norm`` and return its gradient. Autograd differentiates the division of ``[N]`` numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core.launch import cdiv, launch, target_of
from peftkit_kernels.core.op import Differentiable, Op
from peftkit_kernels.low_rank import cast, rows
from peftkit_kernels.low_rank.passes import add_up, readable
from peftkit_kernels.ops.dora_scale.config import BackwardConfig, ForwardConfig
from peftkit_kernels.ops.dora_scale.reference import Scale
from peftkit_kernels.ops.dora_scale.torch_impl import factor

Tensors = Sequence[Tensor | None]


@functools.cache
def _kernels() -> Any:
    from peftkit_kernels.ops.dora_scale import kernels

    return kernels


def obstacle(scales: Sequence[Scale]) -> str | None:
    """Why the kernels cannot compute these factors, or ``None``."""
    for scale in scales:
        if scale.norm is not None and scale.norm.dtype is torch.float64:
            return "a norm is torch.float64; the kernels compute in float32"
    return None


def wide_factor(scale: Scale) -> Tensor | None:
    """``magnitude / norm`` in float32, ``[N]``, differentiable with respect to the magnitude; ``None`` without a norm."""
    if scale.norm is None:
        return None
    return factor(scale.magnitude, cast(scale.norm, torch.float32))


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
) -> list[Tensor]:
    """``dz = dy ∘ g`` if ``g`` is given, and the requested sums, ``Float32[sums, N]``, if there are any.

    Args:
        dy: ``[..., N]``.
        z: As in the forward, to request ``Σ dy ∘ z``; else ``None``.
        g: As in the forward, to request ``dz``; else ``None``.
        needs_bias: Whether to compute ``Σ dy``.
    """
    found = _scale_grads(dy, z, g, needs_bias)
    if not dy.numel():
        return [grad.zero_() for grad in found]
    dz = None if g is None else rows(found[0])
    flat_z, flat = None if z is None else readable(rows(z)), readable(rows(dy))
    M, N = flat.shape
    c = BackwardConfig.choose("dora_scale", M, N, target=target_of(dy))
    chunks = cdiv(M, c.chunk_m)
    sums = found[-1] if z is not None or needs_bias else None
    partial = _partial(sums, chunks)
    launch(
        _kernels().scale_backward_kernel,
        (chunks * cdiv(N, c.block_n),),
        *(flat, flat_z, _columns(g), dz, partial, M, N, c.chunk_m),
        *(flat.stride(0), _row_stride(flat_z), _row_stride(dz)),
        DZ=g is not None,
        DG=z is not None,
        DBIAS=needs_bias,
        BLOCK_M=c.block_m,
        BLOCK_N=c.block_n,
        num_warps=c.num_warps,
        num_stages=1,
    )
    _add_up(partial, sums)
    return found


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``z_gate`` and ``z_up``, and those of ``g_gate``, ``g_up`` and the two biases that ``needs`` selects.

    Returns:
        ``[..., F]`` twice; and ``Float32[sums, F]``, one row for each selected sum.
    """
    dz_gate, dz_up, sums = found = _gate_grads(
        dh, z_gate, z_up, g_gate, g_up, bias_gate, bias_up, act=act, needs=needs
    )
    if not dh.numel():
        sums.zero_()
        return found
    flat, flat_gate, flat_up = (readable(rows(t)) for t in (dh, z_gate, z_up))
    M, F = flat.shape
    c = BackwardConfig.choose("dora_gate", M, F, target=target_of(dh))
    chunks = cdiv(M, c.chunk_m)
    partial = _partial(sums, chunks) if any(needs) else None
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
    return found


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


def _sums(like: Tensor, count: int) -> Tensor:
    return like.new_empty(count, like.shape[-1], dtype=torch.float32)


def _scale_grads(dy: Tensor, z: Tensor | None, g: Tensor | None, needs_bias: bool) -> list[Tensor]:
    count = (z is not None) + needs_bias
    return [*([] if g is None else [_like(dy)]), *([_sums(dy, count)] if count else [])]


def _gate_grads(
    dh: Tensor, *_: Any, act: str, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(dh), _like(dh), _sums(dh, sum(needs))


_GATE = "Tensor z_gate, Tensor z_up, Tensor? g_gate, Tensor? g_up, Tensor? bias_gate, Tensor? bias_up, str act"


def _scale_like(z: Tensor, *_: Any) -> Tensor:
    return _like(z)


def _gate_like(z_gate: Tensor, *_: Any) -> Tensor:
    return _like(z_gate)


def _keep_scale(ctx: Any, inputs: tuple, output: Tensor) -> None:
    z, g, bias = inputs
    trains_g = g is not None and g.requires_grad
    ctx.save_for_backward(z if trains_g else None, g)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _scale_backward(ctx: Any, needs: Sequence[bool], dy: Tensor) -> tuple[Tensor | None, ...]:
    z, g = ctx.saved_tensors
    needs_z, _, needs_bias = needs
    dz = dg = dbias = None
    if needs_z and g is None:
        dz = dy
    wanted = g if needs_z else None
    if wanted is not None or z is not None or needs_bias:
        found = list(_scale_backward_op(dy, z, wanted, needs_bias))
        if wanted is not None:
            dz = found.pop(0)
        sums = list(found[0]) if found else []
        if z is not None:
            dg = sums.pop(0)
        if needs_bias:
            dbias = cast(sums.pop(0), ctx.bias_dtype)
    return dz, dg, dbias


def _keep_gate(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.act = inputs
    ctx.save_for_backward(*tensors)


def _gate_backward(ctx: Any, needs: Sequence[bool], dh: Tensor) -> tuple[Tensor | None, ...]:
    tensors, wanted = ctx.saved_tensors, list(needs[2:])
    dz_gate, dz_up, sums = _gate_backward_op(dh, *tensors, ctx.act, wanted)
    found = iter(sums)
    dg_gate, dg_up, *dbias = (next(found) if needed else None for needed in wanted)
    dbias = [
        None if grad is None else cast(grad, bias.dtype)
        for grad, bias in zip(dbias, tensors[4:], strict=True)
    ]
    return dz_gate, dz_up, dg_gate, dg_up, *dbias


def _gate_grads_like(dh: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _gate_grads(dh, act=others[-2], needs=others[-1])


_dora_scale_op = Op(
    "dora_scale", "(Tensor z, Tensor? g, Tensor? bias) -> Tensor", scale_forward, _scale_like
)
dora_scale_triton = Differentiable(_dora_scale_op, ("z", "g", "bias"), _keep_scale, _scale_backward)
_scale_backward_op = Op(
    "dora_scale_backward",
    "(Tensor dy, Tensor? z, Tensor? g, bool needs_bias) -> Tensor[]",
    scale_backward,
    _scale_grads,
)
_dora_gate_op = Op("dora_gate", f"({_GATE}) -> Tensor", gate_forward, _gate_like)
dora_gate_triton = Differentiable(
    _dora_gate_op,
    ("z_gate", "z_up", "g_gate", "g_up", "bias_gate", "bias_up"),
    _keep_gate,
    _gate_backward,
)
_gate_backward_op = Op(
    "dora_gate_backward",
    f"(Tensor dh, {_GATE}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    gate_backward,
    _gate_grads_like,
)
