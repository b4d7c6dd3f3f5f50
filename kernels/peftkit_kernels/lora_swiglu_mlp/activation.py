"""``h = act(e) ∘ g`` and its gradient: the element-wise heart of a gated MLP, one native pass where there is one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit_kernels import native

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
"""``gelu`` is the exact one (erf), ``gelu_tanh`` its tanh approximation."""


def activate(e: Tensor, act: str) -> Tensor:
    """``act(e)``, one of ``ACTIVATIONS``."""
    if act == "silu":
        return F.silu(e)
    return F.gelu(e, approximate="tanh" if act == "gelu_tanh" else "none")


def gate(e: Tensor, g: Tensor, act: str) -> Tensor:
    """``act(e) ∘ g`` as a new tensor; ``e`` and ``g`` are ``[M, F]``, contiguous."""
    if act in native.GATES and native.takes(e, g):
        return native.gate(e, g, act)
    return activate(e, act).mul_(g)


def gate_backward(dh: Tensor, e: Tensor, g: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``gate`` and its value again: ``(de, dg, h)``.

    Args:
        dh: ``[M, F]``, overwritten.
        e: ``[M, F]``, kept.
        g: ``[M, F]``, kept.
        act: One of ``ACTIVATIONS``.
    """
    if act in native.GATES and native.takes(dh, e, g):
        return native.gate_backward(dh, e, g, act)
    a = activate(e, act)
    de = dh * g
    if act == "silu":
        de = torch.ops.aten.silu_backward(de, e)
    else:
        de = torch.ops.aten.gelu_backward(
            de, e, approximate="tanh" if act == "gelu_tanh" else "none"
        )
    dg = dh.mul_(a)
    return de, dg, a.mul_(g)
