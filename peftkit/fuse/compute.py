"""What a frozen linear with its adapter is, and which op computes one of them, several on one input, or a gated MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkit_kernels.checks import is_autocast_enabled
from peftkit_kernels.dora import dora_norm
from peftkit_kernels.dora_scale import Scale, dora_gate, dora_scale
from peftkit_kernels.lora_linear import lora_linear
from peftkit_kernels.lora_qkv import lora_qkv
from peftkit_kernels.lora_swiglu_mlp import lora_swiglu_mlp
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.nf4 import NF4Weight
from peftkit_kernels.quantized import QuantizedWeight
from peftkit_kernels.quantized_linear import int8_linear, nf4_linear


class Frozen(NamedTuple):
    """A frozen linear with its adapter, as plain tensors: what an op takes.

    Attributes:
        weight: ``Tensor[N, K]``; where it is computed alone also a weight in quantised storage.
        bias: ``[N]`` or ``None``.
        lora: The adapter or ``None``.
        magnitude: ``[N]`` where the adapter is a DoRA.
    """

    weight: Any
    bias: Tensor | None
    lora: LoRA | None
    magnitude: Tensor | None = None


def linear(x: Tensor, part: Frozen) -> Tensor:
    """``x Wᵀ + bias + scale · drop(x) Aᵀ Bᵀ``, its direction brought to the magnitude where there is one.

    Args:
        x: ``[..., K]``.
        part: The linear.

    Returns:
        ``[..., N]``.
    """
    if part.magnitude is None:
        return _product(x, part.weight, part.bias, part.lora)
    scale = _scale(x, part)  # first: it leaves the weight in the cache
    return dora_scale(_product(x, part.weight, None, part.lora), scale)


def linears(x: Tensor, parts: Sequence[Frozen]) -> tuple[Tensor, ...]:
    """Several linears of one input; what they share is computed once."""
    if all(part.magnitude is None for part in parts):
        return lora_qkv(x, *_columns(parts))
    scales = [None if part.magnitude is None else _scale(x, part) for part in parts]
    weights, biases, loras = _columns(parts)
    own = [bias if scale is None else None for bias, scale in zip(biases, scales, strict=True)]
    return tuple(
        z if scale is None else dora_scale(z, scale)
        for z, scale in zip(lora_qkv(x, weights, own, loras), scales, strict=True)
    )


def gated_mlp(x: Tensor, parts: Sequence[Frozen], act: str) -> Tensor:
    """``down(act(gate(x)) ∘ up(x))``.

    Args:
        x: ``[..., D]``.
        parts: Gate, up and down.
        act: One of ``lora_swiglu_mlp.ACTIVATIONS``.
    """
    if all(part.magnitude is None for part in parts):
        return lora_swiglu_mlp(x, *_columns(parts), act)
    gate, up, down = parts
    scales = _scale(x, gate), _scale(x, up)
    z_gate, z_up = lora_qkv(x, (gate.weight, up.weight), (None, None), (gate.lora, up.lora))
    return linear(dora_gate((z_gate, z_up), scales, act), down)


def _columns(parts: Sequence[Frozen]) -> tuple[list, list, list]:
    return (
        [part.weight for part in parts],
        [part.bias for part in parts],
        [part.lora for part in parts],
    )


def _product(
    x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, lora: LoRA | None
) -> Tensor:
    if isinstance(weight, NF4Weight):
        return nf4_linear(x, weight, bias, lora)
    if not isinstance(weight, Tensor):
        return int8_linear(x, weight, bias, lora)
    if lora is None:
        return lora_qkv(x, [weight], [bias], [None])[0]
    return lora_linear(x, weight, bias, lora)


def _scale(x: Tensor, part: Frozen) -> Scale:
    """What brings the direction to its magnitude; the norm is that of the factors as they are now, in float32 or wider."""
    if part.magnitude is None or part.lora is None:
        return Scale(None, None, part.bias)
    if not is_autocast_enabled(x.device.type):
        norm = dora_norm(part.weight, part.lora)
    else:
        with torch.autocast(x.device.type, enabled=False):
            norm = dora_norm(part.weight, part.lora)
    return Scale(part.magnitude, norm, part.bias)
