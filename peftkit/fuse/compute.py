"""``LinearParts``, the tensors of a frozen linear with its adapter, and the ops on them: one linear, several, a gated MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit_kernels.core.checks import autocast_dtype, is_autocast_enabled, without_autocast
from peftkit_kernels.core.dispatch import choose_backend
from peftkit_kernels.core.dropout import apply_dropout, draw_seed
from peftkit_kernels.low_rank import LoRA, adapter_dtype, rows
from peftkit_kernels.ops.dora import dora_linear, dora_norm
from peftkit_kernels.ops.dora_scale import Scale, dora_gate, dora_scale
from peftkit_kernels.ops.lora_linear import lora_linear
from peftkit_kernels.ops.lora_qkv import lora_qkv
from peftkit_kernels.ops.lora_swiglu_mlp import lora_swiglu_mlp
from peftkit_kernels.ops.quantized_linear import fp8_linear, int8_linear, nf4_linear
from peftkit_kernels.storage.fp8 import Float8Weight
from peftkit_kernels.storage.int8 import Int8Weight
from peftkit_kernels.storage.nf4 import NF4Weight
from peftkit_kernels.storage.quantized import QuantizedWeight, contains_update


class LinearParts(NamedTuple):
    """A frozen linear with its adapter, as the plain tensors that an op takes.

    Attributes:
        weight: ``Tensor[N, K]`` or a quantised weight.
        bias: ``[N]`` or ``None``.
        lora: The adapter or ``None``.
        magnitude: ``[N]`` if the adapter is a DoRA, else ``None``.
        dtype: The dtype in which the linear computes and which it converts its input to and its result back from; ``None`` for that of
            its input, or of autocast.
    """

    weight: Any
    bias: Tensor | None
    lora: LoRA | None
    magnitude: Tensor | None = None
    dtype: torch.dtype | None = None


def draw_seeds(parts: LinearParts) -> LinearParts:
    """The same parts with a new dropout seed if they use dropout."""
    if parts.lora is None or parts.lora.p == 0.0:
        return parts
    return parts._replace(lora=replace(parts.lora, seed=draw_seed()))


def backend_of(x: Tensor, parts: LinearParts) -> str:
    """The backend that ``linear(x, parts)`` runs on: ``"torch"`` or ``"triton"``."""
    dtype = autocast_dtype(x) or x.dtype
    op = "lora_linear" if isinstance(parts.weight, Tensor) else "quantized_linear"
    rank = 0 if parts.lora is None else parts.lora.A.shape[0]
    return choose_backend(op, "auto", x.to(dtype), rank=rank)


def gated_mlp_backend(x: Tensor, parts: Sequence[LinearParts]) -> str:
    """The backend that ``gated_mlp(x, parts, act)`` runs on: ``"torch"`` or ``"triton"``."""
    dtype = parts[0].dtype or autocast_dtype(x) or x.dtype
    rank = max([0, *(part.lora.A.shape[0] for part in parts if part.lora is not None)])
    return choose_backend("lora_swiglu_mlp", "auto", x.to(dtype), rank=rank)


def linear(x: Tensor, part: LinearParts) -> Tensor:
    """``x Wᵀ + bias + scale · drop(x) Aᵀ Bᵀ``; with a magnitude, DoRA of this sum.

    Args:
        x: ``[..., K]``.
        part: The linear.

    Returns:
        ``[..., N]``.
    """
    if part.magnitude is None:
        return _product(x, part.weight, part.bias, part.lora)
    scale = _scale(x, part)  # first, so that the weight is in the CPU cache for the product
    if _is_mixed(x, part):
        norms = part.magnitude, scale.norm
        return dora_linear(x, part.weight, part.bias, part.lora, *norms)
    return dora_scale(_product(x, part.weight, None, part.lora), scale)


def linear_in(dtype: torch.dtype, x: Tensor, part: LinearParts) -> Tensor:
    """``linear(x, part)`` whose frozen product is computed in ``dtype``, narrower than that of ``x``; the rest in that of ``x``.

    As in PEFT's layer on a 4-bit base, the adapter reads ``x`` unrounded, and its sum with the product is not rounded to ``dtype``.
    """
    bias = part.bias if part.magnitude is None else None
    z = _product(x.to(dtype), part.weight, bias, None).to(x.dtype)
    lora = part.lora
    if lora is not None:
        wide = adapter_dtype(x, lora.A)
        dropped = apply_dropout(rows(x).to(wide), lora.p, lora.seed)
        update = F.linear(F.linear(dropped, lora.A.to(wide)), lora.B.to(wide)) * lora.scale
        z = (z + update.view(z.shape)).to(x.dtype)
    return z if part.magnitude is None else dora_scale(z, _scale(x, part))


def linears(x: Tensor, parts: Sequence[LinearParts]) -> tuple[Tensor, ...]:
    """Several linears on one input, of one ``dtype``; shared work is done once."""
    if parts[0].dtype is not None:
        with without_autocast(x):
            ys = linears(x.to(parts[0].dtype), [part._replace(dtype=None) for part in parts])
        return tuple(y.to(x.dtype) for y in ys)
    if all(part.magnitude is None for part in parts):
        return lora_qkv(x, *_columns(parts))
    if any(_is_mixed(x, part) or not isinstance(part.weight, Tensor) for part in parts):
        # DoRA alone folds its scale into a decoded weight
        return tuple(linear(x, part) for part in parts)
    scales = [None if part.magnitude is None else _scale(x, part) for part in parts]
    weights, biases, loras = _columns(parts)
    own = [bias if scale is None else None for bias, scale in zip(biases, scales, strict=True)]
    return tuple(
        z if scale is None else dora_scale(z, scale)
        for z, scale in zip(lora_qkv(x, weights, own, loras), scales, strict=True)
    )


def gated_mlp(x: Tensor, parts: Sequence[LinearParts], act: str) -> Tensor:
    """``down(act(gate(x)) ∘ up(x))``.

    Args:
        x: ``[..., D]``.
        parts: Gate, up and down, of one ``dtype``.
        act: One of ``lora_swiglu_mlp.ACTIVATIONS``.
    """
    if parts[0].dtype is not None:
        own = [part._replace(dtype=None) for part in parts]
        with without_autocast(x):
            return gated_mlp(x.to(parts[0].dtype), own, act).to(x.dtype)
    if all(part.magnitude is None for part in parts):
        return lora_swiglu_mlp(x, *_columns(parts), act)
    gate, up, down = parts
    scales = _scale(x, gate), _scale(x, up)
    z_gate, z_up = lora_qkv(x, (gate.weight, up.weight), (None, None), (gate.lora, up.lora))
    return linear(dora_gate((z_gate, z_up), scales, act), down)


def _is_mixed(x: Tensor, part: LinearParts) -> bool:
    """Whether this is a DoRA with wider factors than its 16-bit input.

    Such a DoRA runs as one op, so that the gradient between the scale and the product is not rounded to 16 bits.
    """
    if part.magnitude is None or part.lora is None or is_autocast_enabled(x.device.type):
        return False
    if isinstance(part.weight, Float8Weight):
        # that op decodes the weight; and rounding to float8 costs more than rounding to 16 bits
        return False
    return adapter_dtype(x, part.lora.A) is not x.dtype


def _columns(parts: Sequence[LinearParts]) -> tuple[list, list, list]:
    return (
        [part.weight for part in parts],
        [part.bias for part in parts],
        [part.lora for part in parts],
    )


def _product(
    x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, lora: LoRA | None
) -> Tensor:
    if not isinstance(weight, Tensor):
        if isinstance(weight, NF4Weight):
            return nf4_linear(x, weight, bias, lora)
        if isinstance(weight, Int8Weight):
            return int8_linear(x, weight, bias, lora)
        if isinstance(weight, Float8Weight):
            return fp8_linear(x, weight, bias, lora)
        if contains_update(weight):
            return lora_qkv(x, [weight], [bias], [lora])[0]
        raise TypeError(f"there is no linear on a {type(weight).__name__}")
    if lora is None:
        return lora_qkv(x, [weight], [bias], [None])[0]
    return lora_linear(x, weight, bias, lora)


def _scale(x: Tensor, part: LinearParts) -> Scale:
    """DoRA's scale. The norm is computed from the current factors, in float32 or wider."""
    if part.magnitude is None or part.lora is None:
        return Scale(None, None, part.bias)
    with without_autocast(x):
        norm = dora_norm(part.weight, part.lora)
    return Scale(part.magnitude, norm, part.bias)
