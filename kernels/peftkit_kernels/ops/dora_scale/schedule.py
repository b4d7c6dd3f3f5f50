"""DoRA's magnitude applied to the output of a linear: the schedule of ``dora_scale``.

With ``g = magnitude / norm`` for a constant norm: ``dz = dy ∘ g``, ``dmagnitude = Σ dy ∘ z / norm``, ``dbias = Σ dy``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkit_kernels.core.schedule import Schedule
from peftkit_kernels.ops.dora_scale.reference import Scale
from peftkit_kernels.ops.dora_scale.torch_passes import TorchPasses
from peftkit_kernels.ops.dora_scale.triton_passes import TritonPasses

Passes = TorchPasses | TritonPasses


class Scaled(NamedTuple):
    """The arguments: an input ``[..., N]`` and what is applied to it."""

    z: Tensor
    scale: Scale


class Kept(NamedTuple):
    """What the backward needs: ``z`` and the norm for the gradient of the magnitude, ``g`` for that of ``z``."""

    z: Tensor | None
    g: Tensor | None
    norm: Tensor | None


class Grads(NamedTuple):
    """The tensors that may need a gradient, their gradients, or whether each is needed.

    Gradients of magnitudes and biases are in the dtype of the sums. Autograd casts them.
    """

    z: Any
    magnitude: Any
    bias: Any


def forward(P: Passes, call: Scaled) -> tuple[Tensor, Tensor | None]:
    """``z ∘ g + bias``, and ``g`` if there is a magnitude."""
    magnitude, norm, bias = call.scale
    g = P.factor(magnitude, norm)
    return P.scale(call.z, g, bias), g


def trained(call: Scaled) -> Grads:
    """The input, the magnitude and the bias."""
    return Grads(call.z, call.scale.magnitude, call.scale.bias)


def keep(call: Scaled, y: Tensor, g: Tensor | None, needs: Grads) -> Kept:
    """What the backward needs."""
    return Kept(*((call.z, g, call.scale.norm) if needs.magnitude else (None, g, None)))


def backward(P: Passes, kept: Kept, dy: Tensor, needs: Grads) -> Grads:
    """The gradients that are needed, by the formulas of this module."""
    z = kept.z if needs.magnitude else None
    dz, total, dbias = P.scale_grads(dy, z, kept.g, needs_z=needs.z, needs_bias=needs.bias)
    return Grads(dz, None if total is None or kept.norm is None else total / kept.norm, dbias)


def like(call: Scaled) -> tuple[Tensor, Tensor | None]:
    """Uninitialised results of ``forward``."""
    return call.z.new_empty(call.z.shape), factor_like(call.scale)


def factor_like(scale: Scale) -> Tensor | None:
    """An uninitialised ``g``."""
    return None if scale.norm is None else torch.empty_like(scale.norm, dtype=torch.float32)


def like_grads(kept: Kept, dy: Tensor, needs: Grads) -> Grads:
    """Uninitialised results of ``backward``."""
    dz = None
    if needs.z:
        # without a factor the gradient is the incoming one
        dz = dy if kept.g is None else dy.new_empty(dy.shape)
    return Grads(dz, *(sum_like(dy) if needed else None for needed in needs[1:]))


def sum_like(t: Tensor) -> Tensor:
    """An uninitialised sum over the rows of ``t``."""
    return t.new_empty(t.shape[-1], dtype=torch.float32)


dora_scale = Schedule(
    "dora_scale",
    TorchPasses,
    TritonPasses,
    forward=forward,
    keep=keep,
    backward=backward,
    trained=trained,
    like=like,
    like_grads=like_grads,
    tuples=(Scale, Scaled, Kept, Grads),
)
