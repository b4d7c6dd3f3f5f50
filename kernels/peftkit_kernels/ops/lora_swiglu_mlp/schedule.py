"""A gated MLP with adapters: the schedule of ``lora_swiglu_mlp``.

With ``h = act(gate) ∘ up`` and ``dh = dy Wd + mask ∘ (dsd Ad)``: ``d_up = dh ∘ act(gate)``, ``d_gate = dh ∘ up ∘ act'(gate)``, and the
chain rule of ``ops.lora_linear.schedule`` for each of the three linears. ``h`` is made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from peftkit_kernels.core.schedule import Schedule
from peftkit_kernels.low_rank import adapter_dtype, rows, unflatten
from peftkit_kernels.ops.lora_linear import schedule as linear
from peftkit_kernels.ops.lora_linear.schedule import Grads, Linear, loras_of
from peftkit_kernels.ops.lora_linear.triton_passes import joint_like
from peftkit_kernels.ops.lora_swiglu_mlp.torch_passes import TorchPasses
from peftkit_kernels.ops.lora_swiglu_mlp.triton_passes import TritonPasses, gate_up_like
from peftkit_kernels.storage.quantized import Weight

Passes = TorchPasses | TritonPasses
DOWN = 2
"""Index of the down projection. Gate and up have the indices before it and share their input."""


class MLP(NamedTuple):
    """The arguments: an input ``[..., D]``; gate ``[F, D]``, up ``[F, D]`` and down ``[D, F]``; and the activation."""

    x: Tensor
    linears: list[Linear]
    act: str


class Made(NamedTuple):
    """What the forward makes for the backward.

    Attributes:
        gate_up: The outputs of gate and up, as the passes compute them; ``None`` if they are to be made again.
        s: ``drop(x) Aᵀ`` of each group of adapters of gate and up.
        s_down: ``drop(h) Aᵀ`` of the adapter of down.
    """

    gate_up: list[Tensor] | None
    s: list[Tensor]
    s_down: Tensor | None


class Kept(NamedTuple):
    """What the backward needs: the input for dA of gate and up, and what the forward has made."""

    x: Tensor | None
    linears: list[Linear]
    act: str
    gate_up: list[Tensor] | None
    s: list[Tensor] | None
    s_down: Tensor | None


def forward(P: Passes, call: MLP, *, remade: int = 0) -> tuple[Tensor, Made]:
    """The output, and what the backward needs; ``remade`` is how many of gate and up are left to ``remake``: 0, 1 (the gate), or 2."""
    flat, linears, down = rows(call.x), call.linears, call.linears[DOWN]
    weights = [part.weight for part in linears]
    s = P.shrinks(flat, weights[:DOWN], loras_of(linears[:DOWN]))
    gate_up = P.gate_and_up(flat, linears, s, apart=remade == 1)
    h, s_down = P.gated(gate_up, s, linears, call.act)
    kept = None if remade == 2 else gate_up[remade:]
    del gate_up
    y = P.project(h, down.weight, down.bias, s_down, down.lora)
    return unflatten(y, call.x.shape), Made(kept, s, s_down)


def remake(P: Passes, call: MLP, made: Made) -> list[Tensor]:
    """Gate and up as the forward has computed them: the gate alone if up is kept."""
    flat = rows(call.x)
    if made.gate_up is None:
        return P.gate_and_up(flat, call.linears, made.s)
    return [P.gate(flat, call.linears, made.s), *made.gate_up]


def trained(call: MLP) -> Grads:
    """The input, the biases and the factors."""
    return linear.trained(linear.Linears(call.x, call.linears))


def keep(call: MLP, y: Tensor, made: Made, needs: Grads) -> Kept:
    """What the backward needs."""
    needs_gate = _needs_outer(needs) or needs.A[DOWN]
    return Kept(
        call.x if any(needs.A[:DOWN]) else None,
        call.linears,
        call.act,
        made.gate_up if needs_gate else None,
        made.s if needs_gate else None,
        made.s_down if needs.B[DOWN] else None,
    )


def backward(P: Passes, kept: Kept, dy: Tensor, needs: Grads) -> Grads:
    """The gradients that are needed, by the formulas of this module."""
    flat, loras = rows(dy), loras_of(kept.linears)
    needs_dA, needs_outer = needs.A[DOWN], _needs_outer(needs)
    dbias, dA, dB, ds = flat.sum(0) if needs.bias[DOWN] else None, None, None, []
    needs_ds = needs_outer or needs_dA
    if needs_ds or needs.B[DOWN]:
        (dB,), ds = P.grads_at_output(
            [flat], [kept.s_down], loras[DOWN:], [needs.B[DOWN]], needs_ds
        )
    outer = Grads(None, [None] * DOWN, [None] * DOWN, [None] * DOWN)
    if kept.gate_up is not None and kept.s is not None:
        own = kept.gate_up, kept.s, kept.linears, kept.act
        if needs_outer:
            d_gate, d_up, dA = P.gated_backward(flat, ds, *own, needs_dA=needs_dA)  # pyright: ignore[reportArgumentType]
            outer = linear.backward(P, _outer(kept), (d_gate, d_up), _first(needs))
        elif needs_dA:
            # only dA of the down projection needs h
            h, _ = P.gated(*own, shrink=False)
            (dA,) = P.grads_of_a(h, ds, loras[DOWN:], [True])  # pyright: ignore[reportArgumentType]
    dx = None if outer.x is None else unflatten(outer.x, dy.shape)
    return Grads(dx, [*outer.bias, dbias], [*outer.A, dA], [*outer.B, dB])


def buffers(part: MLP | Kept) -> Sequence[Weight]:
    """The weights of gate and up, which one product computes if they are in one buffer."""
    return [linear.weight for linear in part.linears[:DOWN]]


def like(call: MLP) -> tuple[Tensor, Made]:
    """Uninitialised results of ``forward``."""
    x, M, loras = call.x, call.x.shape[:-1].numel(), loras_of(call.linears)
    F, D = call.linears[0].weight.shape[0], call.linears[DOWN].weight.shape[0]
    s_down, lora = None, loras[DOWN]
    if lora is not None:
        s_down = x.new_empty(M, lora.A.shape[0], dtype=adapter_dtype(x, lora.A))
    made = Made(gate_up_like(x, M, F), joint_like(x, M, loras[:DOWN]), s_down)
    return x.new_empty(*x.shape[:-1], D), made


def like_grads(kept: Kept, dy: Tensor, needs: Grads) -> Grads:
    """Uninitialised results of ``backward``."""
    F = kept.linears[0].weight.shape[0]
    of_outer = dy.new_empty(*dy.shape[:-1], F)
    outer = linear.like_grads(_outer(kept), (of_outer, of_outer), _first(needs))
    down = linear.Kept(None, [kept.linears[DOWN].weight], [kept.linears[DOWN].lora], None)
    rest = Grads(False, *([part[DOWN]] for part in needs[1:]))
    inner = linear.like_grads(down, (dy,), rest)
    return Grads(outer.x, *(a + b for a, b in zip(outer[1:], inner[1:], strict=True)))


def _outer(kept: Kept) -> linear.Kept:
    """What the backward of gate and up needs."""
    linears = kept.linears[:DOWN]
    return linear.Kept(kept.x, [part.weight for part in linears], loras_of(linears), kept.s)


def _first(needs: Grads) -> Grads:
    """The needs of gate and up."""
    return Grads(needs.x, *(part[:DOWN] for part in needs[1:]))


def _needs_outer(needs: Grads) -> Any:
    """Whether the gradients at the outputs of gate and up are needed."""
    return needs.x or any((*needs.bias[:DOWN], *needs.A[:DOWN], *needs.B[:DOWN]))


lora_swiglu_mlp = Schedule(
    "lora_swiglu_mlp",
    TorchPasses,
    TritonPasses,
    forward=forward,
    keep=keep,
    backward=backward,
    trained=trained,
    like=like,
    like_grads=like_grads,
    tuples=(MLP, Made, Kept),
    buffers=buffers,
)
