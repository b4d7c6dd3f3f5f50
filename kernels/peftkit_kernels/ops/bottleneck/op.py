"""The public function: checks, autocast, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.core.checks import autocast_dtype
from peftkit_kernels.core.dispatch import Backend, choose_backend
from peftkit_kernels.core.schedule import replays
from peftkit_kernels.ops.bottleneck import schedule
from peftkit_kernels.ops.bottleneck.config import obstacle
from peftkit_kernels.ops.bottleneck.reference import ACTIVATIONS, bottleneck_reference


def bottleneck(
    h: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: float = 1.0,
    act: str = "relu",
    base: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """A bottleneck adapter: ``y = base + scale · (act(h downᵀ + down_bias) upᵀ + up_bias)``; the base is usually ``h`` itself.

    Kept for backward: ``h`` if ``down`` is trained, and the ``[M, R]`` input of the activation.

    Args:
        h: ``[..., D]``.
        down: ``[R, D]``.
        down_bias: ``[R]`` or ``None``.
        up: ``[D, R]``.
        up_bias: ``[D]`` or ``None``.
        scale: Factor on the output of ``up``, before it is added to the base.
        act: ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"``, ``"tanh"`` or ``"identity"``.
        base: ``[..., D]`` in the dtype of ``h``: the tensor that the adapter adds to. ``None`` means ``h``.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``[..., D]`` in the dtype of ``h``, or of autocast if it is on. Float32 parameters on a 16-bit ``h`` are cast to its
        dtype; their gradients stay float32.

    Raises:
        ValueError: Shapes or dtypes do not fit, the activation is unknown, or the backend cannot run.

    Source: Houlsby et al., 2019, arXiv:1902.00751; with a base: He et al., 2022, arXiv:2110.04366 (parallel adapters).
    """
    tensors = h, down, down_bias, up, up_bias, base
    call = schedule.Adapter(*tensors, float(scale), act)
    if backend == "auto" and replays(h):
        y = schedule.bottleneck.again(call)
        if y is not None:
            return y
    dtype = autocast_dtype(h)
    if dtype is not None:
        with torch.autocast(h.device.type, enabled=False):
            base = None if base is None else base.to(dtype)
            return bottleneck(
                h.to(dtype), down, down_bias, up, up_bias, scale, act, base, backend=backend
            )
    _check(h, down, down_bias, up, up_bias, base, act)
    own = obstacle(down.shape[0])
    chosen = choose_backend("bottleneck", backend, *tensors, own_obstacle=own)
    if chosen == "reference":
        return bottleneck_reference(h, down, down_bias, up, up_bias, scale, act, base)
    return schedule.bottleneck(chosen, call)


def _check(
    h: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    base: Tensor | None,
    act: str,
) -> None:
    if h.dim() < 1 or down.dim() != 2 or down.shape[1] != h.shape[-1] or up.shape != down.T.shape:
        raise ValueError(
            f"down {tuple(down.shape)} and up {tuple(up.shape)} do not fit h {tuple(h.shape)}; "
            "they must be [R, D] and [D, R] for h [..., D]"
        )
    for name, bias, size in (
        ("down_bias", down_bias, down.shape[0]),
        ("up_bias", up_bias, up.shape[0]),
    ):
        if bias is not None and bias.shape != (size,):
            raise ValueError(f"{name} has shape {tuple(bias.shape)}; it must be [{size}]")
    if base is not None and (base.shape != h.shape or base.dtype is not h.dtype):
        raise ValueError(
            f"base is {base.dtype} {tuple(base.shape)} and h {h.dtype} {tuple(h.shape)}; they must have the same dtype and shape"
        )
    if act not in ACTIVATIONS:
        raise ValueError(f"act={act!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
