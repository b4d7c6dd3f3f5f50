"""DoRA's magnitude from torch ops: backward keeps the direction and recomputes everything that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels import native
from peftkit_kernels.core.autograd import once_differentiable
from peftkit_kernels.low_rank import cast, rows, unflatten
from peftkit_kernels.ops.lora_swiglu_mlp.activation import gate_backward, gated

_ROWS = 64
"""Rows whose products are summed at a time: of two tensors of width 2,048 they are 1 MiB, which stays in the second-level cache."""


def factor(magnitude: Tensor | None, norm: Tensor | None) -> Tensor | None:
    """``magnitude / norm`` in the dtype of the norm, ``[N]``."""
    return None if magnitude is None or norm is None else cast(magnitude, norm.dtype) / norm


def scaled(z: Tensor, g: Tensor | None, bias: Tensor | None) -> Tensor:
    """``z ∘ g + bias`` for ``z [M, N]``, computed in the dtype of ``g`` and rounded once. Without ``g`` and bias, ``z`` itself."""
    if g is None:
        return z if bias is None else z + cast(bias, z.dtype)
    if bias is None:
        return torch.mul(z, g, out=torch.empty_like(z))
    return torch.addcmul(cast(bias, g.dtype), z, g, out=torch.empty_like(z))


def scaled_backward(
    dy: Tensor, z: Tensor | None, g: Tensor | None, norm: Tensor | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of ``scaled`` with respect to ``z`` and the magnitude.

    Args:
        dy: ``[M, N]``.
        z: ``[M, N]``, or ``None`` if the magnitude needs no gradient.
        g: As in ``scaled``.
        norm: ``[N]``.
        dtype: The dtype of the magnitude.
    """
    if g is None:
        return dy, None
    dz = torch.empty_like(dy)
    if z is None or norm is None or dtype is None:
        return torch.mul(dy, g, out=dz), None
    if native.supports(dy, z, g):
        total = native.scale_backward(dy, z, g, dz)
    else:
        torch.mul(dy, g, out=dz)
        total = column_products(dy, z)
    return dz, cast(total / norm, dtype)


def column_products(left: Tensor, right: Tensor) -> Tensor:
    """``Σ left ∘ right`` over the rows, ``[N]``, summed in float32 or wider from blocks of rows."""
    wide = torch.promote_types(left.dtype, torch.float32)
    total = left.new_zeros(left.shape[1], dtype=wide)
    for start in range(0, left.shape[0], _ROWS):
        part = slice(start, start + _ROWS)
        total.add_((cast(left[part], wide) * right[part]).sum(0))
    return total


class DoRAScale(torch.autograd.Function):
    """With ``g = magnitude / norm`` for a constant norm:

    ``dz = dy ∘ g``, ``dmagnitude = Σ dy ∘ z / norm``, ``dbias = Σ dy``.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, magnitude: Tensor | None, norm: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        g = factor(magnitude, norm)
        # without g and bias, scaled returns z itself, but the output must be a new tensor
        y = rows(z).clone() if g is None and bias is None else scaled(rows(z), g, bias)
        _, needs_magnitude, _, needs_bias = ctx.needs_input_grad
        ctx.save_for_backward(z if needs_magnitude else None, g, norm)
        ctx.dtype = magnitude.dtype if magnitude is not None and needs_magnitude else None
        ctx.bias_dtype = bias.dtype if bias is not None and needs_bias else None
        return unflatten(y, z.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, g, norm = ctx.saved_tensors
        flat = rows(dy)
        dbias = None if ctx.bias_dtype is None else cast(flat.sum(0), ctx.bias_dtype)
        dz, dmagnitude = scaled_backward(flat, None if z is None else rows(z), g, norm, ctx.dtype)
        return dz.view(dy.shape), dmagnitude, None, dbias


class DoRAGate(torch.autograd.Function):
    """With ``h = act(gate) ∘ up``: ``d_up = dh ∘ act(gate)`` and ``d_gate = dh ∘ up ∘ act'(gate)``.

    From these the chain rule of ``DoRAScale`` gives the gradients of both sides. The tensors are passed in pairs: the ``z``,
    magnitudes, norms and biases of gate and up.
    """

    @staticmethod
    def forward(ctx: Any, act: str, *tensors: Tensor | None) -> Tensor:
        zs, magnitudes, norms, biases = (tensors[i : i + 2] for i in range(0, 8, 2))
        gs = [factor(*pair) for pair in zip(magnitudes, norms, strict=True)]
        h = gate_of(zs, gs, biases, act)
        needs = ctx.needs_input_grad[1:]
        ctx.save_for_backward(*zs, *gs, *norms, *biases)
        ctx.act = act
        ctx.dtypes = [
            None if m is None or not needed else m.dtype
            for m, needed in zip(magnitudes, needs[2:4], strict=True)
        ]
        return unflatten(h, zs[0].shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        zs, gs, norms, biases = (saved[i : i + 2] for i in range(0, 8, 2))
        needs_bias = ctx.needs_input_grad[7:]
        dz, sums = gate_gradients(rows(dh), [rows(z) for z in zs], gs, biases, ctx.act)
        dmagnitude = [
            None if dtype is None else cast(total / norm, dtype)
            for total, norm, dtype in zip(sums[:2], norms, ctx.dtypes, strict=True)
        ]
        dbias = [
            cast(total, bias.dtype) if needed else None
            for total, bias, needed in zip(sums[2:], biases, needs_bias, strict=True)
        ]
        return None, *(grad.view(dh.shape) for grad in dz), *dmagnitude, None, None, *dbias


Sides = Sequence[Tensor | None]
"""One for the gate, one for up."""


def gate_of(zs: Sides, gs: Sides, biases: Sides, act: str) -> Tensor:
    """``act(gate) ∘ up``, ``[M, F]``; gate and up are the scaled ``zs``."""
    flat = [rows(z) for z in zs if z is not None]
    sides = _native_sides(flat, gs, biases, act)
    if sides is not None:
        return native.scaled_gate(flat, *sides, act)
    gate, up = (scaled(z, g, bias) for z, g, bias in zip(flat, gs, biases, strict=True))
    return gated(gate.contiguous(), up.contiguous(), act)


def gate_gradients(
    dh: Tensor, zs: Sequence[Tensor], gs: Sides, biases: Sides, act: str
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of ``gate_of`` with respect to ``zs``, and the sums from which its other gradients follow.

    Returns:
        ``[M, F]`` twice; and ``Σ d_gate ∘ z``, ``Σ d_up ∘ z``, ``Σ d_gate`` and ``Σ d_up``, ``[F]`` each.
    """
    sides = _native_sides([dh, *zs], gs, biases, act)
    if sides is not None:
        *dz, sums = native.scaled_gate_backward(dh, zs, *sides, act)
        return dz, list(sums)
    gate, up = (scaled(*parts).contiguous() for parts in zip(zs, gs, biases, strict=True))
    # gate_backward overwrites the gradient passed to it, and other code may still use dh
    grads = gate_backward(dh.clone(memory_format=torch.contiguous_format), gate, up, act)[:2]
    dz, products = [], []
    for grad, z, g in zip(grads, zs, gs, strict=True):
        dz.append(grad if g is None else torch.mul(grad, g, out=torch.empty_like(grad)))
        products.append(column_products(grad, z))
    return dz, [*products, *(grad.sum(0) for grad in grads)]


def _native_sides(
    tensors: Sequence[Tensor], gs: Sides, biases: Sides, act: str
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Factors and biases for the native passes, ones and zeros if missing; ``None`` if the native passes cannot run."""
    given = [side for side in (*gs, *biases) if side is not None]
    if act not in native.GATES or not native.supports(*tensors, *given):
        return None
    like = tensors[0]
    ones, zeros = like.new_ones(like.shape[1]), like.new_zeros(like.shape[1])
    return (
        [ones if g is None else g for g in gs],
        [zeros if bias is None else bias for bias in biases],
    )
