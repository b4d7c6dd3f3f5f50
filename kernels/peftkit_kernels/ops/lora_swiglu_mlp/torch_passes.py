"""The steps of a gated MLP with adapters by torch operations, and its element-wise part by native code if there is any."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from peftkit_kernels.ops.lora_linear import torch_passes
from peftkit_kernels.ops.lora_linear.schedule import Linear, loras_of
from peftkit_kernels.ops.lora_linear.torch_passes import Joint
from peftkit_kernels.ops.lora_swiglu_mlp.activation import gate_backward, gated


class TorchPasses(torch_passes.TorchPasses):
    """The steps of ``ops.lora_swiglu_mlp.schedule``. ``linears`` are gate, up and down; ``s`` is that of gate and up."""

    def gate_and_up(
        self,
        x: Tensor,
        linears: Sequence[Linear],
        s: Sequence[Tensor],
        *,
        apart: bool = False,
    ) -> list[Tensor]:
        """The outputs of gate and up, ``[M, F]`` each."""
        del apart  # they always are
        parts = zip(linears[:2], self.s_of(s, loras_of(linears[:2])), strict=True)
        return [
            self.project(x, linear.weight, linear.bias, own, linear.lora) for linear, own in parts
        ]

    def gate(self, x: Tensor, linears: Sequence[Linear], s: Sequence[Tensor]) -> Tensor:
        """The first result of ``gate_and_up``."""
        own = self.s_of(s, loras_of(linears[:2]))[0]
        return self.project(x, linears[0].weight, linears[0].bias, own, linears[0].lora)

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
        h, down = gated(*gate_up, act), linears[2]
        if down.lora is None or not shrink:
            return h, None
        return h, self.shrinks(h, [down.weight], [down.lora])[0]

    def gated_backward(
        self,
        dy: Tensor,
        ds: Sequence[Joint],
        gate_up: Sequence[Tensor],
        s: Sequence[Tensor],
        linears: Sequence[Linear],
        act: str,
        *,
        needs_dA: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The gradients of gate and up from that of the output of down, and dA of the adapter of down if needed."""
        down = linears[2]
        dh = self.grad_x([dy], [down.weight], ds, [down.lora])
        d_gate, d_up, h = gate_backward(dh, *gate_up, act)
        (dA,) = self.grads_of_a(h, ds, [down.lora], [needs_dA])
        return d_gate, d_up, dA
