"""The steps of attention with a prefix by Triton kernels, which merge the two flash passes of the library."""

from __future__ import annotations

from torch import Tensor

from peftkit_kernels.ops.prefix_attention import passes
from peftkit_kernels.ops.prefix_attention.flash import Pass


class TritonPasses:
    """The steps of ``ops.prefix_attention.schedule``."""

    runs_natively = False
    """Whether one native pass may compute both parts."""

    def attend(self, own: Pass, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """One pass: the output ``[B, S, H, D]`` and the log-sum-exp ``[B, H, S]``, both contiguous."""
        out, lse = own.forward(q, k, v)
        return out.contiguous(), lse.contiguous()

    def merge(self, o1: Tensor, l1: Tensor, o2: Tensor, l2: Tensor) -> tuple[Tensor, Tensor]:
        """The output and the log-sum-exp over all keys, from those of the two parts."""
        return passes.merge(o1, l1, o2, l2)

    def add_gated(self, o1: Tensor, o2: Tensor, gate: Tensor) -> Tensor:
        """``o1 + gate · o2``."""
        return passes.add_gated(o1, o2, gate)

    def gate_grad(self, dout: Tensor, o2: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """``gate · dout``, and ``dgate = Σ dout ∘ o2``."""
        return passes.gate_grad(dout, o2, gate)

    def as_grad(self, grad: Tensor) -> Tensor:
        """``grad [B, H, S, D]`` with the strides of a contiguous ``[B, S, H, D]``, which ``like_grads`` has and most passes return."""
        return grad.transpose(1, 2).contiguous().transpose(1, 2)
