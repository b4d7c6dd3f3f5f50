"""The steps of ``dora_scale`` and ``dora_gate`` by torch operations, and by native code if there is any."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkit_kernels import native
from peftkit_kernels.core.blocks import starts
from peftkit_kernels.low_rank import cast, rows, unflatten
from peftkit_kernels.ops.lora_swiglu_mlp.activation import gate_backward, gated

Sides = Sequence[Tensor | None]
"""One for the gate, one for up."""

_ROWS = 64
"""Rows whose products are summed at a time: of two tensors of width 2,048 they are 1 MiB, which stays in the second-level cache."""


class TorchPasses:
    """The steps of ``ops.dora_scale.schedule`` and of ``ops.dora_scale.gate_schedule``."""

    def factor(self, magnitude: Tensor | None, norm: Tensor | None) -> Tensor | None:
        """``magnitude / norm`` in the dtype of the norm, ``[N]``."""
        return factor(magnitude, norm)

    def scale(self, z: Tensor, g: Tensor | None, bias: Tensor | None) -> Tensor:
        """``z ∘ g + bias``, a new tensor in the shape and dtype of ``z [..., N]``."""
        flat = rows(z)
        y = flat.clone() if g is None and bias is None else scaled(flat, g, bias)
        return unflatten(y, z.shape)

    def scale_grads(
        self,
        dy: Tensor,
        z: Tensor | None,
        g: Tensor | None,
        *,
        needs_z: bool,
        needs_bias: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """``dz = dy ∘ g`` if it is needed, ``Σ dy ∘ z`` if ``z`` is given, and ``Σ dy`` if the bias needs it."""
        flat = rows(dy)
        dbias = flat.sum(0) if needs_bias else None
        if g is None:
            return dy if needs_z else None, None, dbias
        dz = total = None
        if z is not None and native.supports(flat, rows(z), g):
            dz = torch.empty_like(flat)
            total = native.scale_backward(flat, rows(z), g, dz)
        else:
            if needs_z:
                dz = torch.mul(flat, g, out=torch.empty_like(flat))
            if z is not None:
                total = column_products(flat, rows(z))
        return dz.view(dy.shape) if needs_z and dz is not None else None, total, dbias

    def gate(self, zs: Sequence[Tensor], gs: Sides, biases: Sides, act: str) -> Tensor:
        """``act(gate) ∘ up`` in the shape of the ``zs``; gate and up are the scaled ``zs``."""
        flat = [rows(z) for z in zs]
        sides = _native_sides(flat, gs, biases, act)
        if sides is not None:
            h = native.scaled_gate(flat, *sides, act)
        else:
            gate, up = (scaled(*parts) for parts in zip(flat, gs, biases, strict=True))
            h = gated(gate.contiguous(), up.contiguous(), act)
        return unflatten(h, zs[0].shape)

    def gate_grads(
        self,
        dh: Tensor,
        zs: Sequence[Tensor],
        gs: Sides,
        biases: Sides,
        act: str,
        needs: Sequence[bool],
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The gradients of ``gate`` with respect to ``zs``, and the sums from which its other gradients follow.

        Returns:
            ``[..., F]`` twice; and those of ``Σ d_gate ∘ z``, ``Σ d_up ∘ z``, ``Σ d_gate`` and ``Σ d_up``, ``[F]`` each, that
            ``needs`` selects.
        """
        shape, dh, zs = dh.shape, rows(dh), [rows(z) for z in zs]
        sides = _native_sides([dh, *zs], gs, biases, act)
        if sides is not None:
            *dz, sums = native.scaled_gate_backward(dh, zs, *sides, act)
        else:
            gate, up = (scaled(*parts).contiguous() for parts in zip(zs, gs, biases, strict=True))
            # gate_backward overwrites the gradient passed to it, and other code may still use dh
            own = dh.clone(memory_format=torch.contiguous_format)
            grads = gate_backward(own, gate, up, act)[:2]
            dz, sums = [], []
            for grad, z, g, needed in zip(grads, zs, gs, needs[:2], strict=True):
                dz.append(grad if g is None else torch.mul(grad, g, out=torch.empty_like(grad)))
                sums.append(column_products(grad, z) if needed else None)
            sums += [
                grad.sum(0) if needed else None
                for grad, needed in zip(grads, needs[2:], strict=True)
            ]
        wanted = [total if needed else None for total, needed in zip(sums, needs, strict=True)]
        return [grad.view(shape) for grad in dz], wanted


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


def column_products(left: Tensor, right: Tensor) -> Tensor:
    """``Σ left ∘ right`` over the rows, ``[N]``, summed in float32 or wider from blocks of rows."""
    wide = torch.promote_types(left.dtype, torch.float32)
    total = left.new_zeros(left.shape[1], dtype=wide)
    for start in starts(left.shape[0], _ROWS):
        part = slice(start, start + _ROWS)
        total.add_((cast(left[part], wide) * right[part]).sum(0))
    return total


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
