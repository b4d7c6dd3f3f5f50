"""Several frozen linears of one input, each with or without an adapter: the schedule of ``lora_linear``, of the linears on quantised
weights, and of ``lora_qkv``.

With ``s = drop(x) Aᵀ`` and ``ds = scale · dy B`` of each adapter:

``dB = scale · dyᵀ s``, ``dA = dsᵀ drop(x)``, ``dx = Σ dy W + mask ∘ (ds A)``, ``dbias = Σ dy``.

The masks are made again from their seeds. Neither they nor a decoded weight are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from peftkit_kernels.core.schedule import Schedule
from peftkit_kernels.low_rank import LoRA, rows, unflatten
from peftkit_kernels.ops.lora_linear.torch_passes import TorchPasses
from peftkit_kernels.ops.lora_linear.triton_passes import TritonPasses, joint_like
from peftkit_kernels.storage.quantized import Weight

Passes = TorchPasses | TritonPasses


class Linear(NamedTuple):
    """A frozen linear: ``[N, K]``, ``[N]``, and an adapter."""

    weight: Weight
    bias: Tensor | None
    lora: LoRA | None


class Linears(NamedTuple):
    """The arguments: an input ``[..., K]`` and its linears."""

    x: Tensor
    linears: list[Linear]


class Kept(NamedTuple):
    """What the backward needs: ``x`` for dA, ``s`` (``[M, ΣR]`` of each group of adapters) for dB."""

    x: Tensor | None
    weights: list[Weight]
    loras: list[LoRA | None]
    s: list[Tensor] | None


class Grads(NamedTuple):
    """The tensors that may need a gradient, their gradients, or whether each is needed; lists have an entry for each linear."""

    x: Any
    bias: list[Any]
    A: list[Any]
    B: list[Any]


def loras_of(linears: Sequence[Linear]) -> list[LoRA | None]:
    """The adapter of each linear."""
    return [linear.lora for linear in linears]


def forward(P: Passes, call: Linears) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """``x Wᵀ + bias + scale · s Bᵀ`` of each linear, and ``s`` of each group of adapters."""
    flat, weights = rows(call.x), [linear.weight for linear in call.linears]
    s = P.shrinks(flat, weights, loras_of(call.linears))
    return _outputs(P, call, flat, s), s


def outputs(P: Passes, call: Linears, s: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The first result of ``forward``, from the second."""
    return _outputs(P, call, rows(call.x), s)


def _outputs(P: Passes, call: Linears, flat: Tensor, s: Sequence[Tensor]) -> tuple[Tensor, ...]:
    parts = zip(call.linears, P.s_of(s, loras_of(call.linears)), strict=True)
    ys = [P.project(flat, linear.weight, linear.bias, own, linear.lora) for linear, own in parts]
    return tuple(unflatten(y, call.x.shape) for y in ys)


def trained(call: Linears) -> Grads:
    """The input, the biases and the factors."""
    return Grads(
        call.x,
        [linear.bias for linear in call.linears],
        [linear.lora and linear.lora.A for linear in call.linears],
        [linear.lora and linear.lora.B for linear in call.linears],
    )


def keep(call: Linears, ys: Any, s: list[Tensor], needs: Grads) -> Kept:
    """What the backward needs."""
    return Kept(
        call.x if any(needs.A) else None,
        [linear.weight for linear in call.linears],
        loras_of(call.linears),
        s if any(needs.B) else None,
    )


def backward(P: Passes, kept: Kept, dys: Sequence[Tensor | None], needs: Grads) -> Grads:
    """The gradients that are needed, by the formula of this module."""
    flat, loras = [None if dy is None else rows(dy) for dy in dys], kept.loras
    dbias = [
        dy.sum(0) if needed and dy is not None else None
        for dy, needed in zip(flat, needs.bias, strict=True)
    ]
    dx, dA, dB, ds = None, [None] * len(loras), [None] * len(loras), []
    needs_ds = needs.x or any(needs.A)
    if needs_ds or any(needs.B):
        ss = [None] * len(loras) if kept.s is None else P.s_of(kept.s, loras)
        dB, ds = P.grads_at_output(flat, ss, loras, needs.B, needs_ds)
    if needs.x:
        dx = P.grad_x(flat, kept.weights, ds, loras)  # pyright: ignore[reportArgumentType]
        dx = unflatten(dx, next(dy.shape for dy in dys if dy is not None))
    if any(needs.A) and kept.x is not None:
        dA = P.grads_of_a(rows(kept.x), ds, loras, needs.A)  # pyright: ignore[reportArgumentType]
    return Grads(dx, dbias, dA, dB)


def buffers(part: Linears | Kept) -> Sequence[Weight]:
    """The weights: the backward multiplies those in one buffer as one."""
    return part.weights if isinstance(part, Kept) else [linear.weight for linear in part.linears]


def like(call: Linears) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Uninitialised results of ``forward``."""
    x, M = call.x, call.x.shape[:-1].numel()
    ys = tuple(x.new_empty(*x.shape[:-1], linear.weight.shape[0]) for linear in call.linears)
    return ys, joint_like(x, M, loras_of(call.linears))


def like_grads(kept: Kept, dys: Sequence[Tensor | None], needs: Grads) -> Grads:
    """Uninitialised results of ``backward``."""
    dy = next(dy for dy in dys if dy is not None)
    width = kept.weights[0].shape[1]
    return Grads(
        dy.new_empty(*dy.shape[:-1], width) if needs.x else None,
        [
            own.new_empty(own.shape[-1]) if needed and own is not None else None
            for own, needed in zip(dys, needs.bias, strict=True)
        ],
        [
            lora.A.new_empty(lora.A.shape) if needed and lora is not None else None
            for lora, needed in zip(kept.loras, needs.A, strict=True)
        ],
        [
            lora.B.new_empty(lora.B.shape)
            if needed and lora is not None and own is not None
            else None
            for lora, own, needed in zip(kept.loras, dys, needs.B, strict=True)
        ],
    )


linears = Schedule(
    "lora_linear",
    TorchPasses,
    TritonPasses,
    forward=forward,
    keep=keep,
    backward=backward,
    trained=trained,
    like=like,
    like_grads=like_grads,
    tuples=(Linear, Linears, Kept, Grads),
    outputs=lambda call: len(call.linears),
    buffers=buffers,
)
