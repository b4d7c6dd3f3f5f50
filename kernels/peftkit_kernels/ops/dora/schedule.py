"""A frozen linear with an adapter and a magnitude: the schedule of ``dora_linear``.

With ``g = magnitude / norm`` for a constant norm, ``s = drop(x) Aᵀ`` and ``ds = scale · (dy ∘ g) B``:

``dB = scale · g ∘ (dyᵀ s)``, ``dA = dsᵀ drop(x)``, ``dx = (dy ∘ g) W + mask ∘ (ds A)``, ``dbias = Σ dy``,
``dmagnitude = Σ dy ∘ (y - bias) / magnitude``, or ``Σ dy ∘ z / norm`` if the direction ``z`` is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from peftkit_kernels.core.schedule import Schedule
from peftkit_kernels.low_rank import LoRA, adapter_dtype, cast, rows, unflatten
from peftkit_kernels.ops.dora.torch_passes import TorchPasses
from peftkit_kernels.ops.dora.triton_passes import TritonPasses
from peftkit_kernels.storage.quantized import Weight

Passes = TorchPasses | TritonPasses


class DoRA(NamedTuple):
    """The arguments, as ``dora_linear`` describes them."""

    x: Tensor
    weight: Weight
    bias: Tensor | None
    lora: LoRA
    magnitude: Tensor
    norm: Tensor
    keep_direction: bool


class Made(NamedTuple):
    """What the forward makes for the backward: ``[M, R]``, ``[N]``, and ``[M, N]`` if the direction is kept."""

    s: Tensor
    g: Tensor
    z: Tensor | None


class Kept(NamedTuple):
    """What the backward needs.

    Attributes:
        x: For dA.
        weight: For dx.
        lora: For dx, dA and dB.
        magnitude: For its gradient. It is kept in any case, so that autograd notices if it changes before the backward.
        g: For all but the gradients of magnitude and bias.
        s: For dB.
        bias: For the gradient of the magnitude, if the direction is not kept.
        norm: For the gradient of the magnitude, if the direction is kept.
        y: For the gradient of the magnitude: the direction if it is kept, else the output.
        keep_direction: As in the arguments.
    """

    x: Tensor | None
    weight: Weight
    lora: LoRA
    magnitude: Tensor
    g: Tensor
    s: Tensor | None
    bias: Tensor | None
    norm: Tensor | None
    y: Tensor | None
    keep_direction: bool


class Grads(NamedTuple):
    """The tensors that may need a gradient, their gradients, or whether each is needed."""

    x: Any
    bias: Any
    A: Any
    B: Any
    magnitude: Any


def folds(rows: int, weight: Weight) -> bool:
    """Whether ``g`` multiplies the rows of the weight instead of the output.

    This is cheaper if the weight is decoded anyway, or is smaller than the output. A 16-bit weight is not folded: each scaled
    row would be rounded, and the gradient of the magnitude would contain that error.
    """
    if not isinstance(weight, Tensor):
        return True
    return weight.dtype.itemsize >= 4 and rows >= weight.shape[1]


def forward(P: Passes, call: DoRA) -> tuple[Tensor, Made]:
    """``g (x Wᵀ + scale · s Bᵀ) + bias``, and what the backward needs."""
    x, weight, bias, lora, magnitude, norm, keep_direction = call
    flat, bias = rows(x), None if bias is None else cast(bias, x.dtype)
    g = cast(magnitude, norm.dtype) / norm
    s, z = P.shrink(flat, lora), None
    if keep_direction:
        z = P.direction(flat, weight, s, lora)
        y = P.scale(z, g, bias)
    elif folds(flat.shape[0], weight):
        y = P.folded(flat, weight, s, lora, g, bias)
    else:
        y = P.scaled_in_place(flat, weight, s, lora, g, bias)  # pyright: ignore[reportArgumentType]
    return unflatten(y, x.shape), Made(s, g, z)


def trained(call: DoRA) -> Grads:
    """The input, the bias, the factors and the magnitude."""
    return Grads(call.x, call.bias, call.lora.A, call.lora.B, call.magnitude)


def keep(call: DoRA, y: Tensor, made: Made, needs: Grads) -> Kept:
    """What the backward needs."""
    of_magnitude: tuple[Tensor | None, ...] = None, None, None
    if needs.magnitude:
        of_direction, of_output = (None, call.norm, made.z), (call.bias, None, y)
        of_magnitude = of_direction if call.keep_direction else of_output
    return Kept(
        call.x if needs.A else None,
        call.weight,
        call.lora,
        call.magnitude,
        made.g,
        made.s if needs.B else None,
        *of_magnitude,
        call.keep_direction,
    )


def backward(P: Passes, kept: Kept, dy: Tensor, needs: Grads) -> Grads:
    """The gradients that are needed, by the formulas of this module."""
    flat, weight, lora, g = rows(dy), kept.weight, kept.lora, kept.g
    dx = dA = dB = ds = dmagnitude = None
    if needs.magnitude and kept.y is not None:
        if kept.norm is not None:
            direction = kept.y, kept.norm, kept.magnitude
            dmagnitude = P.grad_magnitude_of_direction(flat, *direction)
        else:
            dmagnitude = P.grad_magnitude(flat, rows(kept.y), kept.bias, kept.magnitude)
    needs_ds = needs.x or needs.A
    if needs_ds or needs.B:
        dB, ds = P.grads_at_output(flat, kept.s if needs.B else None, lora, g, needs_ds)
    if needs.A and kept.x is not None and ds is not None:
        dA = P.grad_a(rows(kept.x), ds, lora)
    if needs.x and ds is not None:
        folded = folds(flat.shape[0], weight) and not kept.keep_direction
        dx = unflatten(P.grad_x(flat, weight, g, ds, lora, folded=folded), dy.shape)
    return Grads(dx, flat.sum(0) if needs.bias else None, dA, dB, dmagnitude)


def like(call: DoRA) -> tuple[Tensor, Made]:
    """Uninitialised results of ``forward``."""
    x, A, N, M = call.x, call.lora.A, call.weight.shape[0], call.x.shape[:-1].numel()
    made = Made(
        x.new_empty(M, A.shape[0], dtype=adapter_dtype(x, A)),
        call.norm.new_empty(call.norm.shape),
        x.new_empty(M, N) if call.keep_direction else None,
    )
    return x.new_empty(*x.shape[:-1], N), made


def like_grads(kept: Kept, dy: Tensor, needs: Grads) -> Grads:
    """Uninitialised results of ``backward``."""
    lora, magnitude = kept.lora, kept.magnitude
    return Grads(
        dy.new_empty(*dy.shape[:-1], kept.weight.shape[1]) if needs.x else None,
        dy.new_empty(dy.shape[-1]) if needs.bias else None,
        lora.A.new_empty(lora.A.shape) if needs.A else None,
        lora.B.new_empty(lora.B.shape) if needs.B else None,
        magnitude.new_empty(magnitude.shape) if needs.magnitude else None,
    )


dora_linear = Schedule(
    "dora_linear",
    TorchPasses,
    TritonPasses,
    forward=forward,
    keep=keep,
    backward=backward,
    trained=trained,
    like=like,
    like_grads=like_grads,
    tuples=(DoRA, Made, Kept, Grads),
)
