"""The layer by the public ops of its parts, which choose their own fast schedules and are differentiated by autograd."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.attention import attention
from peftkit_kernels.ops.frozen_norm import frozen_rms_norm
from peftkit_kernels.ops.lora_decoder_layer.reference import Norm, rotated
from peftkit_kernels.ops.lora_qkv import lora_qkv
from peftkit_kernels.ops.lora_swiglu_mlp import lora_swiglu_mlp
from peftkit_kernels.storage.quantized import Weight


def lora_decoder_layer_torch(
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
    """As ``lora_decoder_layer_reference``."""
    h = _norm(x, norms[0])
    projected = lora_qkv(h, weights[:3], biases[:3], loras[:3])
    q, k, v = (t.unflatten(-1, (-1, cos.shape[-1])) for t in projected)
    if norms[2:]:
        q, k = _norm(q, norms[2]), _norm(k, norms[3])
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    o = attention(q, k, v, scale, causal=True).flatten(2)
    (o,) = lora_qkv(o, weights[3:4], biases[3:4], loras[3:4])
    x = x + o
    return x + lora_swiglu_mlp(_norm(x, norms[1]), weights[4:], biases[4:], loras[4:], act), k, v


def _norm(x: Tensor, norm: Norm) -> Tensor:
    offset, round_first = norm.offset, norm.round_first
    return frozen_rms_norm(x, norm.weight, norm.eps, offset=offset, round_first=round_first)
