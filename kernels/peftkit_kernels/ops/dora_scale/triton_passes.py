"""The steps of ``dora_scale`` and ``dora_gate`` by one Triton kernel each way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkit_kernels.low_rank import cast
from peftkit_kernels.ops.dora_scale import passes
from peftkit_kernels.ops.dora_scale.torch_passes import Sides, factor


class TritonPasses:
    """The steps of ``ops.dora_scale.schedule`` and of ``ops.dora_scale.gate_schedule``."""

    def factor(self, magnitude: Tensor | None, norm: Tensor | None) -> Tensor | None:
        """``magnitude / norm`` in float32, ``[N]``."""
        return factor(magnitude, None if norm is None else cast(norm, torch.float32))

    def scale(self, z: Tensor, g: Tensor | None, bias: Tensor | None) -> Tensor:
        """``z ∘ g + bias``, a new tensor in the shape and dtype of ``z [..., N]``."""
        return passes.scale_forward(z, g, bias)

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
        wanted = g if needs_z else None
        dz, sums = dy if needs_z and g is None else None, None
        if wanted is not None or z is not None or needs_bias:
            found, sums = passes.scale_backward(dy, z, wanted, needs_bias)
            dz = dz if found is None else found
        total, dbias = _selected(sums, [z is not None, needs_bias])
        return dz, total, dbias

    def gate(self, zs: Sequence[Tensor], gs: Sides, biases: Sides, act: str) -> Tensor:
        """``act(gate) ∘ up`` in the shape of the ``zs``; gate and up are the scaled ``zs``."""
        return passes.gate_forward(*zs, *gs, *biases, act)

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
        *dz, sums = passes.gate_backward(dh, *zs, *gs, *biases, act, needs)
        return dz, _selected(sums, needs)


def _selected(sums: Tensor | None, needs: Sequence[bool]) -> list[Tensor | None]:
    """The rows of ``sums``, which has one for each that is needed, and ``None`` for the others."""
    found = iter(() if sums is None else sums)
    return [next(found) if needed else None for needed in needs]
