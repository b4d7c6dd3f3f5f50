"""One flash pass over some keys, by whatever the machine has: the native library, or torch's own for CPUs and GPUs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peftkit_kernels import native
from peftkit_kernels.attention import native_obstacle
from peftkit_kernels.low_rank import cast

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_GPU_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention
_GPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward
_GPU_HEAD_SIZE = 256
_MIN_QUERIES = 16
"""Fewer are left to torch: the native passes take blocks of 64 queries."""


class Pass(NamedTuple):
    """One flash pass over some keys; on the CPU by the native library where that takes the tensors, else by torch's own.

    Attributes:
        scale: Factor on the scores.
        causal: Query ``i`` sees keys up to ``i``.
        mask: ``Bool[B, 1, S, T]`` or ``None``.
    """

    scale: float
    causal: bool = False
    mask: Tensor | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The output ``[B, S, H, D]`` and the log-sum-exp ``[B, H, S]``; 0 and minus infinity for a query that sees nothing."""
        if q.device.type != "cpu":
            out, lse, *_ = _GPU_FORWARD(q, k, v, 0.0, self.causal, False, scale=self.scale)
            return out.transpose(1, 2), lse
        if self.is_native(q, k, v):
            out, lse = native.attention(q, k, v, self.scale, self.causal, self.mask)
        else:
            out, lse = _FORWARD(
                q, k, v, 0.0, self.causal, attn_mask=self._additive(q), scale=self.scale
            )
            out = out.transpose(1, 2)
        if self.mask is not None:
            # both libraries call it 0
            visible = self.mask.tril() if self.causal else self.mask
            lse = lse.masked_fill(~visible.any(-1), -torch.inf)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, ...]:
        """``(dq, dk, dv)`` for ``P = exp(scale q kᵀ - lse)`` and ``dS = P ∘ (dout vᵀ - rowsum(dout ∘ out))``.

        With the output and log-sum-exp of several passes merged these are the parts of the joint gradient.
        """
        if q.device.type != "cpu":
            # no dropout, so no state of a generator; the lengths are those of the tensors
            state = q.new_empty(2, dtype=torch.int64)
            return _GPU_BACKWARD(
                *(dout.transpose(1, 2), q, k, v, out.transpose(1, 2), lse, None, None),
                *(q.shape[2], k.shape[2], 0.0, self.causal, state, state),
                scale=self.scale,
            )
        if self.is_native(q, k, v):
            return native.attention_backward(
                dout, q, k, v, out, lse, self.scale, self.causal, self.mask
            )
        return _BACKWARD(
            *(dout.transpose(1, 2), q, k, v, out.transpose(1, 2), lse, 0.0, self.causal),
            attn_mask=self._additive(q),
            scale=self.scale,
        )

    def is_native(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether the native library takes the pass."""
        return q.shape[2] >= _MIN_QUERIES and native_obstacle(q, k, v, self.mask) is None

    def obstacle(self, q: Tensor) -> str | None:
        """Why no pass takes ``q`` or the mask, as a sentence, or ``None``."""
        if q.device.type == "cpu":
            return None
        if self.mask is not None:
            return "the library's flash attention for GPUs takes no mask"
        if q.dtype not in (torch.bfloat16, torch.float16):
            return f"q is {q.dtype}; the library's flash attention for GPUs computes in 16 bits"
        if q.shape[3] % 8 or q.shape[3] > _GPU_HEAD_SIZE:
            return (
                f"the head size is {q.shape[3]}; the library's flash attention for GPUs takes "
                f"multiples of 8 up to {_GPU_HEAD_SIZE}"
            )
        return None

    def _additive(self, q: Tensor) -> Tensor | None:
        if self.mask is None:
            return None
        hidden = torch.zeros(self.mask.shape, dtype=q.dtype, device=q.device)
        return hidden.masked_fill_(~self.mask, -torch.inf)


def of_batch(prefix: Tensor, q: Tensor) -> Tensor:
    """``[H_kv, P, D]`` as ``[B, H_kv, P, D]`` without a copy for every sequence."""
    return cast(prefix, q.dtype).expand(q.shape[0], *prefix.shape)


def over_batch(grad: Tensor, prefix: Tensor) -> Tensor:
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.sum(0, dtype=wide).to(prefix.dtype)
