"""Dense causal attention as two plain functions, forward and backward, for schedules: by cuDNN or by torch's flash attention.

Autograd does not see them. Grouped-query heads are read in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit_kernels.ops.attention import cudnn

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward
_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_CUDNN = torch.ops.aten._scaled_dot_product_cudnn_attention
_CUDNN_BACKWARD = torch.ops.aten._scaled_dot_product_cudnn_attention_backward

_FLASH_HEAD_SIZE = 256


def kernel_for(x: Tensor, length: int, head_size: int) -> str | None:
    """``"cudnn"`` or ``"flash"``, or ``None`` if ``obstacle`` returns a reason; arguments as for ``obstacle``."""
    if x.device.type == "cpu":
        return "flash"
    if cudnn.size_obstacle(x, length, head_size) is None:
        return "cudnn"
    return "flash" if obstacle(x, length, head_size) is None else None


def obstacle(x: Tensor, length: int, head_size: int) -> str | None:
    """Why neither cuDNN nor flash attention computes the causal attention of such queries, as a sentence, or ``None``.

    Args:
        x: Any tensor with the dtype and device of the queries.
        length: Queries and keys of each sequence.
        head_size: Features of a head.
    """
    if x.device.type in ("cpu", "meta") or cudnn.size_obstacle(x, length, head_size) is None:
        return None
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"its input is {x.dtype}; flash attention computes in 16 bits"
    if head_size % 8 or head_size > _FLASH_HEAD_SIZE:
        return f"the head size is {head_size}; flash attention needs a multiple of 8 up to {_FLASH_HEAD_SIZE}"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "torch's flash attention is switched off"
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms were asked for"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, kernel: str
) -> tuple[Tensor, list[Tensor]]:
    """Causal ``softmax(scale q kᵀ) v``, ``[B, S, H, D]``, and the numbers that ``backward`` needs.

    Args:
        q: ``[B, H, S, D]``.
        k: ``[B, H_kv, S, D]``.
        v: As ``k``.
        scale: Factor on the scores.
        kernel: ``"cudnn"`` or ``"flash"``.
    """
    if kernel == "cudnn":
        S = q.shape[2]
        q, k, v = (_padded(t) for t in (q, k, v))
        out, lse, _, _, _, _, seed, offset, _ = _CUDNN(
            q, k, v, None, True, 0.0, True, False, scale=scale
        )
        return out[:, :, :S].transpose(1, 2), [lse, seed, offset]
    if q.device.type == "cpu":
        out, lse = _CPU(q, k, v, 0.0, True, scale=scale)
        lse = lse.contiguous()
    else:
        out, lse, *_ = _FLASH(q, k, v, 0.0, True, False, scale=scale)
    return out.transpose(1, 2), [lse]


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    numbers: Sequence[Tensor],
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)`` in the shapes of q, k and v. ``dout`` and ``out`` are ``[B, S, H, D]``; ``numbers`` are those of ``forward``."""
    dout, out = dout.transpose(1, 2), out.transpose(1, 2)
    if kernel == "cudnn":
        S = q.shape[2]
        dout, q, k, v, out = (_padded(t) for t in (dout, q, k, v, out))
        length = q.shape[2]
        grads = _CUDNN_BACKWARD(
            *(dout, q, k, v, out, *numbers, None, None, None, length, length, 0.0, True),
            scale=scale,
        )
        dq, dk, dv = (grad[:, :, :S] for grad in grads)
    elif q.device.type == "cpu":
        dq, dk, dv = _CPU_BACKWARD(dout, q, k, v, out, *numbers, 0.0, True, scale=scale)
    else:
        # without dropout the generator's state is not read; the lengths are those of the tensors
        state, length = q.new_empty(2, dtype=torch.int64), q.shape[2]
        dq, dk, dv = _FLASH_BACKWARD(
            *(dout, q, k, v, out, *numbers, None, None, length, length, 0.0, True, state, state),
            scale=scale,
        )
    return dq, dk, dv


def _padded(t: Tensor) -> Tensor:
    """``t [B, H, S, D]`` with zeros up to a whole bucket of positions, which no earlier query sees."""
    rest = -t.shape[2] % cudnn.BUCKET
    return F.pad(t, (0, 0, 0, rest)) if rest else t
