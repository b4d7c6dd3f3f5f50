"""The middle of a gated MLP of DoRA linears: the schedule of ``dora_gate``.

With ``h = act(gate) ∘ up``: ``d_up = dh ∘ act(gate)`` and ``d_gate = dh ∘ up ∘ act'(gate)``. From these, the chain rule of
``ops.dora_scale.schedule`` gives the gradients of both sides. gate and up are made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from peftkit_kernels.core.schedule import Schedule
from peftkit_kernels.ops.dora_scale.reference import Scale
from peftkit_kernels.ops.dora_scale.schedule import Grads, Passes, factor_like, sum_like
from peftkit_kernels.ops.dora_scale.torch_passes import TorchPasses
from peftkit_kernels.ops.dora_scale.triton_passes import TritonPasses


class Gate(NamedTuple):
    """The arguments: two inputs ``[..., F]``, what is applied to each, and the activation."""

    z_gate: Tensor
    z_up: Tensor
    scales: list[Scale]
    act: str


class Kept(NamedTuple):
    """What the backward needs. Lists have an entry for the gate and one for up."""

    zs: list[Tensor]
    gs: list[Tensor | None]
    norms: list[Tensor | None]
    biases: list[Tensor | None]
    act: str


def forward(P: Passes, call: Gate) -> tuple[tuple[Tensor, ...], None]:
    """``h``, and the factors ``g`` of those sides that have a magnitude. With them ``h`` can be made again."""
    magnitudes, norms, biases = _parts(call.scales)
    gs = [P.factor(*pair) for pair in zip(magnitudes, norms, strict=True)]
    h = P.gate(call[:2], gs, biases, call.act)
    return (h, *(g for g in gs if g is not None)), None


def factors_of(scales: Sequence[Scale], found: Sequence[Tensor]) -> list[Tensor | None]:
    """``g`` of each side, from the results of ``forward`` after the first."""
    present = iter(found)
    return [None if scale.norm is None else next(present) for scale in scales]


def trained(call: Gate) -> Grads:
    """The inputs, the magnitudes and the biases; lists of two."""
    magnitudes, _, biases = _parts(call.scales)
    return Grads(list(call[:2]), magnitudes, biases)


def keep(call: Gate, results: Sequence[Tensor], made: None, needs: Grads) -> Kept:
    """What the backward needs."""
    _, norms, biases = _parts(call.scales)
    wanted = zip(norms, needs.magnitude, strict=True)
    return Kept(
        list(call[:2]),
        factors_of(call.scales, results[1:]),
        [norm if needed else None for norm, needed in wanted],
        biases,
        call.act,
    )


def backward(P: Passes, kept: Kept, grads: Sequence[Tensor | None], needs: Grads) -> Grads:
    """The gradients that are needed, by the formulas of this module. The factors are constants for their other users."""
    dh = grads[0]
    assert dh is not None, "no other result is used where gradients are computed"
    zs, gs, norms, biases, act = kept
    sums = *needs.magnitude, *needs.bias
    dz, found = P.gate_grads(dh, zs, gs, biases, act, sums)
    dmagnitude = [
        None if total is None or norm is None else total / norm
        for total, norm in zip(found[:2], norms, strict=True)
    ]
    wanted = zip(dz, needs.z, strict=True)
    return Grads([grad if needed else None for grad, needed in wanted], dmagnitude, found[2:])


def like(call: Gate) -> tuple[tuple[Tensor, ...], None]:
    """Uninitialised results of ``forward``."""
    gs = map(factor_like, call.scales)
    return (call.z_gate.new_empty(call.z_gate.shape), *(g for g in gs if g is not None)), None


def like_grads(kept: Kept, grads: Sequence[Tensor | None], needs: Grads) -> Grads:
    """Uninitialised results of ``backward``."""
    z = kept.zs[0]
    return Grads(
        [z.new_empty(z.shape) if needed else None for needed in needs.z],
        *([sum_like(z) if needed else None for needed in part] for part in needs[1:]),
    )


def _parts(scales: Sequence[Scale]) -> list[list[Tensor | None]]:
    """The magnitudes, the norms and the biases of both sides."""
    return [list(part) for part in zip(*scales, strict=True)]


dora_gate = Schedule(
    "dora_gate",
    TorchPasses,
    TritonPasses,
    forward=forward,
    keep=keep,
    backward=backward,
    trained=trained,
    like=like,
    like_grads=like_grads,
    tuples=(Scale, Gate, Kept, Grads),
    outputs=lambda call: 1 + sum(scale.norm is not None for scale in call.scales),
)
