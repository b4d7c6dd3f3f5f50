"""One flash pass over some keys: by the native library, or by torch's flash attention for CPUs or GPUs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peftkit_kernels import native
from peftkit_kernels.low_rank import cast
from peftkit_kernels.ops.attention import native_obstacle

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_GPU_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention
_GPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward
_GPU_HEAD_SIZE = 256
_MIN_QUERIES = 16
"""With fewer queries torch's pass runs, because the native passes process blocks of 64 queries."""


class Pass(NamedTuple):
    """One flash pass over some keys. On the CPU the native library runs it if it supports the tensors, else torch does.

    Attributes:
        scale: Factor on the scores.
        causal: Query ``i`` sees keys up to ``i``.
        mask: ``Bool[B, 1, S, T]`` or ``None``.
    """

    scale: float
    causal: bool = False
    mask: Tensor | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The output ``[B, S, H, D]`` and the log-sum-exp ``[B, H, S]``; minus infinity for a query that sees no key."""
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
            # both libraries return 0 for a query that sees no key
            visible = self.mask.tril() if self.causal else self.mask
            lse = lse.masked_fill(~visible.any(-1), -torch.inf)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, ...]:
        """``(dq, dk, dv)`` for ``P = exp(scale q kᵀ - lse)`` and ``dS = P ∘ (dout vᵀ - rowsum(dout ∘ out))``.

        If ``out`` and ``lse`` are those of several merged passes, the result is this pass's part of the joint gradient.
        """
        if q.device.type != "cpu":
            # without dropout the generator's state is not read; the lengths are those of the tensors
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
        """Whether the native library runs the pass."""
        return q.shape[2] >= _MIN_QUERIES and native_obstacle(q, k, v, self.mask) is None

    def obstacle(self, q: Tensor) -> str | None:
        """Why no pass supports ``q`` or the mask, as a sentence, or ``None``."""
        if q.device.type == "cpu":
            return None
        if self.mask is not None:
            return "torch's flash attention for GPUs supports no mask"
        if q.dtype not in (torch.bfloat16, torch.float16):
            return f"q is {q.dtype}; torch's flash attention for GPUs computes in 16 bits"
        if q.shape[3] % 8 or q.shape[3] > _GPU_HEAD_SIZE:
            return (
                f"the head size is {q.shape[3]}; torch's flash attention for GPUs supports "
                f"multiples of 8 up to {_GPU_HEAD_SIZE}"
            )
        return None

    def _additive(self, q: Tensor) -> Tensor | None:
        """The mask as numbers that are added to the scores: 0 or minus infinity."""
        if self.mask is None:
            return None
        hidden = torch.zeros(self.mask.shape, dtype=q.dtype, device=q.device)
        return hidden.masked_fill_(~self.mask, -torch.inf)


def of_batch(prefix: Tensor, q: Tensor) -> Tensor:
    """``[H_kv, P, D]`` as ``[B, H_kv, P, D]``, without copying the prefix for every sequence."""
    return cast(prefix, q.dtype).expand(q.shape[0], *prefix.shape)


def over_batch(grad: Tensor, prefix: Tensor) -> Tensor:
    """The sum of ``grad`` over the sequences, in float32 or wider, rounded to the dtype of ``prefix``."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.sum(0, dtype=wide).to(prefix.dtype)
