"""The row norms of an updated weight: the schedule of ``dora_norm``. They are constants for autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peftkit_kernels.core.schedule import Schedule
from peftkit_kernels.ops.dora.torch_passes import TorchPasses
from peftkit_kernels.ops.dora.triton_passes import TritonPasses
from peftkit_kernels.storage.quantized import Weight

Passes = TorchPasses | TritonPasses


class UpdatedWeight(NamedTuple):
    """The arguments: ``W [N, K]``, and ``scale · B A``."""

    weight: Weight
    A: Tensor
    B: Tensor
    scale: float


class Grads(NamedTuple):
    """No tensor gets a gradient."""


def forward(P: Passes, call: UpdatedWeight) -> tuple[Tensor, None]:
    """``|W + scale · B A|`` of every row."""
    return P.weight_norm(*call), None


def trained(call: UpdatedWeight) -> Grads:
    """Nothing."""
    return Grads()


def keep(call: UpdatedWeight, norm: Tensor, made: None, needs: Grads) -> None:
    """What the backward needs: nothing."""


def backward(P: Passes, kept: None, grad: Tensor, needs: Grads) -> Grads:
    """The gradients: none."""
    return Grads()


def like(call: UpdatedWeight) -> tuple[Tensor, None]:
    """Uninitialised results of ``forward``."""
    return call.A.new_empty(call.weight.shape[0], dtype=torch.float32), None


def like_grads(kept: None, grad: Tensor, needs: Grads) -> Grads:
    """Uninitialised results of ``backward``."""
    return Grads()


dora_norm = Schedule(
    "dora_norm",
    TorchPasses,
    TritonPasses,
    forward=forward,
    keep=keep,
    backward=backward,
    trained=trained,
    like=like,
    like_grads=like_grads,
    tuples=(UpdatedWeight, Grads),
)
