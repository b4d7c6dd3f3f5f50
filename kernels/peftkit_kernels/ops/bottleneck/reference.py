"""The definition of ``bottleneck``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda z: z,
}


def bottleneck_reference(
    h: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: float,
    act: str = "relu",
    base: Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """``y = base + scale · (act(h downᵀ + down_bias) upᵀ + up_bias)``, evaluated in ``compute_dtype`` (default: of ``h``).

    Args:
        h: ``[..., D]``.
        down: ``[R, D]``.
        down_bias: ``[R]`` or ``None``.
        up: ``[D, R]``.
        up_bias: ``[D]`` or ``None``.
        scale: Factor on the output of ``up``, before it is added to the base.
        act: One of ``ACTIVATIONS``.
        base: ``[..., D]``; ``None`` means ``h``.
        compute_dtype: Dtype of every product.
    """
    dtype = compute_dtype or h.dtype
    h, down, up = (t.to(dtype) for t in (h, down, up))
    down_bias, up_bias = (None if b is None else b.to(dtype) for b in (down_bias, up_bias))
    a = ACTIVATIONS[act](F.linear(h, down, down_bias))
    return (h if base is None else base.to(dtype)) + scale * F.linear(a, up, up_bias)
