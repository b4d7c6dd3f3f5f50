"""The steps of a gated MLP with adapters by Triton kernels around the library's GEMMs.

Gate and up are the halves of one ``[M, 2F]``. If their weights are the halves of one buffer too, one product computes both. The
kernels of the gate add the updates of gate and up and compute the shrink of down, if they hold the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.low_rank import LoRA, cast
from peftkit_kernels.ops.lora_linear import triton_passes
from peftkit_kernels.ops.lora_linear.schedule import Linear, loras_of
from peftkit_kernels.ops.lora_linear.triton_passes import project
from peftkit_kernels.ops.lora_swiglu_mlp.config import holds
from peftkit_kernels.ops.lora_swiglu_mlp.passes import gate_backward, gate_forward
from peftkit_kernels.storage.fp8 import Float8Weight
from peftkit_kernels.storage.int8 import Int8ComputeWeight
from peftkit_kernels.storage.quantized import contains_update, stacked_triton

_NO_UPDATE: Any = [(None, None)]
_NOTHING: Any = [None] * 2, [None] * 3
"""The arguments ``s`` and ``loras`` of the gate's kernels if gate and up contain their updates."""


class TritonPasses(triton_passes.TritonPasses):
    """The steps of ``ops.lora_swiglu_mlp.schedule``. ``linears`` are gate, up and down; ``s`` is that of gate and up."""

    def gate_and_up(
        self,
        x: Tensor,
        linears: Sequence[Linear],
        s: Sequence[Tensor],
        *,
        apart: bool = False,
    ) -> list[Tensor]:
        """The outputs of gate and up as one ``[M, 2F]``, or with ``apart`` as two; without the updates that the gate's kernels add."""
        updates, outer = self._updates(x, linears, s), linears[:2]
        if apart:
            parts = zip(outer, updates, strict=True)
            return [self.project(x, part.weight, part.bias, *update) for part, update in parts]
        both = x.new_empty(x.shape[0], sum(part.weight.shape[0] for part in outer))
        biases = [cast(part.bias, x.dtype) for part in outer if part.bias is not None]
        in_8_bits = any(
            isinstance(part.weight, (Int8ComputeWeight, Float8Weight)) for part in outer
        )
        if len(biases) != 1 and updates == _NO_UPDATE * 2 and not in_8_bits:
            W = stacked_triton([part.weight for part in outer], x.dtype)
            if W is not None:
                return [project(x, W, bias=torch.cat(biases) if biases else None, out=both)]
        for part, update, out in zip(outer, updates, _halves(both), strict=True):
            self.project(x, part.weight, part.bias, *update, out=out)
        return [both]

    def gate(self, x: Tensor, linears: Sequence[Linear], s: Sequence[Tensor]) -> Tensor:
        """The first result of ``gate_and_up`` with ``apart``."""
        update = self._updates(x, linears, s)[0]
        return self.project(x, linears[0].weight, linears[0].bias, *update)

    def _updates(
        self, x: Tensor, linears: Sequence[Linear], s: Sequence[Tensor]
    ) -> list[tuple[Tensor | None, LoRA | None]]:
        """``drop(x) Aᵀ`` and the adapter of gate and up, if their products add the updates."""
        if _holds(x, linears):
            return _NO_UPDATE * 2
        loras = loras_of(linears[:2])
        return list(zip(self.s_of(s, loras), loras, strict=True))

    def gated(
        self,
        gate_up: Sequence[Tensor],
        s: Sequence[Tensor],
        linears: Sequence[Linear],
        act: str,
        *,
        shrink: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """``h = act(gate) ∘ up``; and ``drop(h) Aᵀ`` of the adapter of down, if there is one and with ``shrink``."""
        (gate, up), down = _apart(gate_up), linears[2]
        lora = down.lora if shrink else None
        if _holds(gate, linears):
            outer = loras_of(linears[:2])
            return gate_forward(gate, up, self.s_of(s, outer), [*outer, lora], act)
        h, _ = gate_forward(gate, up, *_NOTHING, act)
        return h, None if lora is None else self.shrinks(h, [down.weight], [lora])[0]

    def gated_backward(
        self,
        dy: Tensor,
        ds: Sequence[Tensor],
        gate_up: Sequence[Tensor],
        s: Sequence[Tensor],
        linears: Sequence[Linear],
        act: str,
        *,
        needs_dA: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The gradients of gate and up from that of the output of down, and dA of the adapter of down if needed.

        dA is undefined until the next ``grads_at_output``, which computes the sums that this leaves.
        """
        (gate, up), loras, down = _apart(gate_up), loras_of(linears), linears[2]
        if _holds(gate, linears):
            dh = self.grad_x([dy], [down.weight], [], [None])
            own = self.s_of(s, loras[:2]), ds[0] if ds else None, loras
            return gate_backward(dh, gate, up, *own, act, needs_dA=needs_dA, sums=self.sums)
        dh = self.grad_x([dy], [down.weight], ds, loras[2:])
        no_s, no_loras = _NOTHING
        d_gate, d_up, _ = gate_backward(dh, gate, up, no_s, None, no_loras, act, needs_dA=False)
        dA = None
        if needs_dA:
            h, _ = self.gated(gate_up, s, linears, act, shrink=False)
            (dA,) = self.grads_of_a(h, ds, loras[2:], [True])
        return d_gate, d_up, dA


def gate_up_like(x: Tensor, M: int, F: int) -> list[Tensor]:
    """An uninitialised result of ``gate_and_up``."""
    return [x.new_empty(M, 2 * F)]


def _holds(x: Tensor, linears: Sequence[Linear]) -> bool:
    """Whether the gate's kernels compute the updates of gate and up and the shrink of down. They do not if a weight contains an update."""
    if any(contains_update(part.weight) for part in linears):
        return False
    ranks = [part.lora.A.shape[0] for part in linears if part.lora is not None]
    return holds(max([0, *ranks]), x.element_size())


def _halves(gate_up: Tensor) -> Sequence[Tensor]:
    return gate_up.split(gate_up.shape[1] // 2, 1)


def _apart(gate_up: Sequence[Tensor]) -> Sequence[Tensor]:
    return _halves(gate_up[0]) if len(gate_up) == 1 else gate_up
