"""The steps of attention with a prefix by torch operations, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.low_rank import cast
from peftkit_kernels.ops.prefix_attention.flash import Pass


class TorchPasses:
    """The steps of ``ops.prefix_attention.schedule``."""

    runs_natively = True
    """Whether one native pass may compute both parts."""

    def attend(self, own: Pass, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """One pass: the output ``[B, S, H, D]`` and the log-sum-exp ``[B, H, S]``."""
        return own.forward(q, k, v)

    def merge(self, o1: Tensor, l1: Tensor, o2: Tensor, l2: Tensor) -> tuple[Tensor, Tensor]:
        """The output and the log-sum-exp over all keys, from those of the two parts; ``o1`` may be overwritten."""
        total = torch.logaddexp(l1, l2)
        w1, w2 = _columns(l1 - total), _columns(l2 - total)
        if o1.dtype is w1.dtype:
            return o1.mul_(w1).addcmul_(o2, w2), total
        return (o1 * w1).addcmul_(o2, w2).to(o1.dtype), total

    def add_gated(self, o1: Tensor, o2: Tensor, gate: Tensor) -> Tensor:
        """``o1 + gate · o2``."""
        return (o1 + o2 * _wide(gate, o2)[:, None]).to(o1.dtype)

    def gate_grad(self, dout: Tensor, o2: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """``gate · dout``, and ``dgate = Σ dout ∘ o2``."""
        wide = _wide(gate, o2)
        do2 = (dout * wide[:, None]).to(dout.dtype)
        return do2, (dout.to(wide.dtype) * o2).sum((0, 1, 3)).to(gate.dtype)

    def as_grad(self, grad: Tensor) -> Tensor:
        """``grad`` as it is."""
        return grad


def _wide(gate: Tensor, o: Tensor) -> Tensor:
    """``gate`` in the widest of its dtype, that of ``o`` and float32."""
    return cast(gate, torch.promote_types(gate.dtype, torch.promote_types(o.dtype, torch.float32)))


def _columns(log_weight: Tensor) -> Tensor:
    """``exp`` of ``[B, H, S]`` as ``[B, S, H, 1]``."""
    return log_weight.exp().transpose(1, 2)[..., None]
