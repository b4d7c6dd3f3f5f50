"""The public functions: checks, choice of backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from peftkit_kernels.core import recompute
from peftkit_kernels.core.dispatch import Backend, choose_backend
from peftkit_kernels.ops.dora_scale import gate_schedule, schedule
from peftkit_kernels.ops.dora_scale.reference import (
    Scale,
    dora_gate_reference,
    dora_scale_reference,
)
from peftkit_kernels.ops.dora_scale.torch_passes import TorchPasses
from peftkit_kernels.ops.dora_scale.triton_passes import TritonPasses
from peftkit_kernels.ops.lora_swiglu_mlp.activation import ACTIVATIONS


def dora_scale(z: Tensor, scale: Scale, *, backend: Backend = "auto") -> Tensor:
    """The output of a DoRA linear from the output of its LoRA linear: ``y = z ∘ magnitude / norm + bias``.

    Kept for backward: ``z`` if the magnitude is trained.

    Args:
        z: ``[..., N]``: ``x Wᵀ + scale · drop(x) Aᵀ Bᵀ``, without bias.
        scale: Magnitude, norm (from ``dora_norm``) and bias.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``[..., N]``, a new tensor in the dtype of ``z``. It is computed in the dtype of the norm (float32 on Triton) and
        rounded once.

    Raises:
        ValueError: Shapes do not fit, the norm requires a gradient or is missing, or the backend cannot run.

    Source: Liu et al., 2024, arXiv:2402.09353, equation 5 and section 4.3.
    """
    _check(z, scale, "scale")
    chosen = _choose("dora_scale", backend, (z,), (scale,))
    if chosen == "reference":
        return dora_scale_reference(z, scale)
    return schedule.dora_scale(chosen, schedule.Scaled(z, scale))


def dora_gate(
    zs: tuple[Tensor, Tensor],
    scales: tuple[Scale, Scale],
    act: str = "silu",
    *,
    backend: Backend = "auto",
) -> Tensor:
    """The middle of a gated MLP of DoRA linears: ``h = act(gate) ∘ up``, each computed as by ``dora_scale``.

    Kept for backward: the two ``z``. The op that reads ``h`` can recompute it from them and need not keep it.

    Args:
        zs: ``[..., F]`` each: the outputs of the LoRA linears of gate and up, without bias.
        scales: For gate and up. If a side has no magnitude, only its bias is added.
        act: One of ``lora_swiglu_mlp.ACTIVATIONS``.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``[..., F]`` in the dtype of the ``zs``.

    Raises:
        ValueError: Shapes do not fit, a norm requires a gradient or is missing, ``act`` is unknown, or the backend
            cannot run.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act={act!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
    if len(zs) != 2 or len(scales) != 2 or zs[0].shape != zs[1].shape:
        raise ValueError(
            f"zs have shapes {[tuple(z.shape) for z in zs]} with {len(scales)} scales; pass two of each, for gate and up, with "
            "equal shapes"
        )
    for i, (z, scale) in enumerate(zip(zs, scales, strict=True)):
        _check(z, scale, f"scales[{i}]")
    chosen = _choose("dora_gate", backend, zs, scales)
    if chosen == "reference":
        return dora_gate_reference(zs, scales, act)
    call = gate_schedule.Gate(*zs, list(scales), act)
    h, *factors = gate_schedule.dora_gate(chosen, call)
    if not h.requires_grad or torch.compiler.is_compiling():
        return h
    # detached, because they are constants for whoever makes h again
    gs = gate_schedule.factors_of(scales, [g.detach() for g in factors])
    passes = TritonPasses() if chosen == "triton" else TorchPasses()

    def make(*tensors: Tensor | None) -> Tensor:
        return passes.gate(tensors[:2], tensors[2:4], tensors[4:], act)  # pyright: ignore[reportArgumentType]

    # the factors of this forward: an optimiser step changes the magnitudes, but not these
    return recompute.tag(h, make, *zs, *gs, *(scale.bias for scale in scales))


def _choose(
    op: str, backend: Backend, zs: Sequence[Tensor], scales: Sequence[Scale]
) -> Literal["reference", "torch", "triton"]:
    tensors = *zs, *(part for scale in scales for part in scale)
    return choose_backend(op, backend, *tensors, has_dot=False)


def _check(z: Tensor, scale: Scale, name: str) -> None:
    for part, tensor in zip(Scale._fields, scale, strict=True):
        if tensor is not None and tensor.shape != z.shape[-1:]:
            raise ValueError(
                f"{name}.{part} has shape {tuple(tensor.shape)}; for z {tuple(z.shape)} it must be [{z.shape[-1]}]"
            )
    if (scale.magnitude is None) != (scale.norm is None):
        raise ValueError(f"{name} has only a magnitude or only a norm; pass both, or neither")
    if scale.norm is not None and scale.norm.requires_grad:
        raise ValueError(
            f"{name}.norm requires a gradient, but DoRA treats it as a constant; pass norm.detach()"
        )
