"""Argument checks shared by the public functions. They take well under a microsecond for each tensor, so they always run."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from peftkit_kernels.low_rank import LoRA

# computed at import, because some versions of torch.compile cannot trace is_autocast_available
_WITHOUT_AUTOCAST = frozenset(
    name for name in ("lazy", "meta", "vulkan") if not torch.amp.is_autocast_available(name)
)


def is_autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for tensors of this device type; false for types without autocast, such as ``"meta"``.

    Args:
        device_type: As in ``tensor.device.type``.
    """
    return device_type not in _WITHOUT_AUTOCAST and torch.is_autocast_enabled(device_type)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast converts ``x`` to, or ``None`` if autocast is off or leaves ``x`` unchanged."""
    kind = x.device.type
    if not is_autocast_enabled(kind):
        return None
    if x.dtype is torch.float64 or not x.is_floating_point():
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """A context in which autocast is off for the device of ``x``."""
    kind = x.device.type
    if not is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def check_counts(
    weights: Sequence[object], biases: Sequence[object], loras: Sequence[object]
) -> None:
    """Raise ``ValueError`` unless the three lists have one entry for each linear."""
    if not len(weights) == len(biases) == len(loras):
        raise ValueError(
            f"there are {len(weights)} weights, {len(biases)} biases and {len(loras)} loras; pass one of each for "
            "every linear, and None for a missing bias or adapter"
        )


class Shaped(Protocol):
    """Anything with the shape of a weight: a tensor, or a weight in quantised storage."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, K)``."""
        ...


def check_bias(bias: Tensor | None, weight: Shaped, name: str) -> None:
    """Raise ``ValueError`` unless ``bias`` is ``[N]`` for ``weight [N, K]``, or ``None``."""
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(bias.shape)}; for a weight {tuple(weight.shape)} it must be [{weight.shape[0]}]"
        )


def check_weight(x: Tensor, weight: Shaped, name: str) -> None:
    """Raise ``ValueError`` unless ``weight`` is a frozen ``[N, K]`` for ``x [..., K]``."""
    if len(weight.shape) != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)} and x {tuple(x.shape)}; {name} must be [N, K] for x [..., K]"
        )
    check_frozen(weight, name)


def check_frozen(weight: Shaped, name: str) -> None:
    """Raise ``ValueError`` if ``weight`` requires a gradient."""
    if isinstance(weight, Tensor) and weight.requires_grad:
        raise ValueError(
            f"{name} requires a gradient, but this op does not compute one; freeze it with requires_grad_(False)"
        )


def check_lora(lora: LoRA, weight: Shaped, name: str) -> None:
    """Raise ``ValueError`` unless the factors of ``lora`` fit ``weight [N, K]``."""
    (N, K), A, B = weight.shape, lora.A, lora.B
    if (
        A.dim() != 2
        or B.dim() != 2
        or A.shape[1] != K
        or B.shape[0] != N
        or A.shape[0] != B.shape[1]
    ):
        raise ValueError(
            f"{name}: A {tuple(A.shape)} and B {tuple(B.shape)} do not fit a weight {(N, K)}; "
            f"they must be [R, {K}] and [{N}, R]"
        )
    if A.dtype != B.dtype:
        raise ValueError(
            f"{name}: A is {A.dtype} and B is {B.dtype}; keep both factors in one dtype"
        )
