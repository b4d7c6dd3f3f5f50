"""The definition in plain torch, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.attention import attention_reference
from peftkit_kernels.ops.frozen_norm import rms_norm_reference
from peftkit_kernels.ops.lora_qkv import lora_qkv_reference
from peftkit_kernels.ops.lora_swiglu_mlp import lora_swiglu_mlp_reference
from peftkit_kernels.storage.quantized import Weight


class Norm(NamedTuple):
    """A frozen RMSNorm, as ``frozen_rms_norm`` takes it.

    Attributes:
        weight: ``[D]``.
        eps: Added to the mean square.
        offset: Added to the weight.
        round_first: Whether the normalised value is rounded before it is multiplied with the weight.
    """

    weight: Tensor
    eps: float
    offset: float = 0.0
    round_first: bool = True


def lora_decoder_layer_reference(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: Sequence[Norm],
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    loras: Sequence[LoRA | None],
    act: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, k, v)`` of the formula in the README; arguments as for ``lora_decoder_layer``."""
    first, second, *of_heads = norms
    head_size = cos.shape[-1]
    h = _norm(x, first)
    projected = lora_qkv_reference(h, weights[:3], biases[:3], loras[:3])
    q, k, v = (t.unflatten(-1, (-1, head_size)) for t in projected)
    if of_heads:
        q, k = (_norm(t, norm) for t, norm in zip((q, k), of_heads, strict=True))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    o = attention_reference(q, k, v, scale, causal=True).flatten(2)
    (o,) = lora_qkv_reference(o, weights[3:4], biases[3:4], loras[3:4])
    x = x + o
    h = _norm(x, second)
    return x + lora_swiglu_mlp_reference(h, weights[4:], biases[4:], loras[4:], act), k, v


def _norm(x: Tensor, norm: Norm) -> Tensor:
    offset, round_first = norm.offset, norm.round_first
    return rms_norm_reference(x, norm.weight, norm.eps, offset=offset, round_first=round_first)


def rotated(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``t ∘ cos + rotate_half(t) ∘ sin`` for ``t [B, H, S, D]`` and ``cos``, ``sin`` ``[B or 1, S, D]``, as Llama rotates."""
    first, second = t.chunk(2, -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return t * cos + torch.cat((-second, first), -1) * sin
