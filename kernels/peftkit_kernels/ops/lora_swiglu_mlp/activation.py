"""``h = act(gate) ∘ up`` and its gradient: the element-wise part of a gated MLP, in one native pass if there is one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit_kernels import native

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
"""``gelu`` is the exact one (erf), ``gelu_tanh`` its tanh approximation."""


def activate(gate: Tensor, act: str) -> Tensor:
    """``act(gate)``; ``act`` is one of ``ACTIVATIONS``."""
    if act == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none")


def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """``act(gate) ∘ up`` as a new tensor; ``gate`` and ``up`` are ``[M, F]``, contiguous."""
    if act in native.GATES and native.supports(gate, up):
        return native.gated(gate, up, act)
    return activate(gate, act).mul_(up)


def gate_backward(dh: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``gated`` and its value: ``(d_gate, d_up, h)``.

    Args:
        dh: ``[M, F]``, overwritten.
        gate: ``[M, F]``, not changed.
        up: ``[M, F]``, not changed.
        act: One of ``ACTIVATIONS``.
    """
    if act in native.GATES and native.supports(dh, gate, up):
        return native.gate_backward(dh, gate, up, act)
    a = activate(gate, act)
    d_gate = dh * up
    if act == "silu":
        d_gate = torch.ops.aten.silu_backward(d_gate, gate)
    else:
        d_gate = torch.ops.aten.gelu_backward(
            d_gate, gate, approximate="tanh" if act == "gelu_tanh" else "none"
        )
    d_up = dh.mul_(a)
    return d_gate, d_up, a.mul_(up)
