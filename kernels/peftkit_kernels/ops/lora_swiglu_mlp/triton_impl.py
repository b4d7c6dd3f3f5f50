"""``lora_swiglu_mlp`` by Triton kernels around the library's GEMMs: two passes for the gate, and those of ``lora_qkv`` for gate and up.

Gate and up are the halves of one ``[M, 2F]``. If their weights are the halves of one buffer too, one product computes both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core import recompute
from peftkit_kernels.core.op import Differentiable, Op
from peftkit_kernels.low_rank import LoRA, adapter_dtype, cast, passes, rows
from peftkit_kernels.low_rank.groups import group, members_of, shrink_groups
from peftkit_kernels.ops.lora_linear.torch_impl import unflatten
from peftkit_kernels.ops.lora_linear.triton_impl import project
from peftkit_kernels.ops.lora_qkv import triton_impl as qkv
from peftkit_kernels.ops.lora_qkv.triton_impl import loras_of, split, with_gaps
from peftkit_kernels.ops.lora_swiglu_mlp.config import holds
from peftkit_kernels.ops.lora_swiglu_mlp.passes import gate_backward, gate_forward
from peftkit_kernels.storage.int8 import Int8ComputeWeight
from peftkit_kernels.storage.quantized import (
    Weight,
    arguments_of,
    dense_triton,
    stacked_triton,
    weights_of,
)

Tensors = Sequence[Tensor | None]
DOWN = 2
"""Index of the down projection; gate and up have the indices before it and share their input."""


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    storage: Sequence[int],
    biases: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    biased: Sequence[int],
    adapted: Sequence[int],
    scales: Sequence[float],
    ps: Sequence[float],
    seeds: Sequence[int],
    act: str,
    *,
    remade: int = 0,
) -> tuple[Tensor, Any, list[Tensor]]:
    """``y`` as ``lora_swiglu_mlp`` defines it, gate and up (``[M, 2F]``), and every ``drop(x) Aᵀ``.

    Gate and up are without their updates, unless the ranks are more than the gate's kernels hold. ``remade`` is how many of the two
    are left to ``remake``: with 1 the second result is up alone, with 2 it is ``None``. The last list has one tensor for each group of adapters of gate and up, then that of the down projection if it has an
    adapter. The lists of arguments have no gaps, as in ``lora_qkv``.
    """
    if not x.numel():
        numbers = adapted, scales, ps, seeds
        return _empty_outputs(x, weights, storage, biases, As, Bs, biased, *numbers, act)
    *outer, inner = weights_of(weights, storage)
    flat, loras = rows(x), loras_of(3, As, Bs, adapted, scales, ps, seeds)
    bias = with_gaps(biases, biased, 3)
    groups = group(loras[:DOWN])
    joint = shrink_groups(flat, loras[:DOWN], groups)
    ss = members_of(joint, loras[:DOWN], groups, 1)
    inside = _holds(flat, loras)
    updates = [None, None] if inside else list(zip(ss, loras, strict=False))
    if remade == 1:
        gate, up = map(_project, [flat] * 2, outer, bias, updates)
        gate_up = up
    else:
        gate_up = _gate_and_up(flat, outer, bias[:DOWN], updates)
        gate, up = _halves(gate_up)
        gate_up = gate_up if remade == 0 else None
    down = loras[DOWN]
    h, s = gate_forward(gate, up, *((ss, loras) if inside else _NO_UPDATES), act)
    if down is None:
        return unflatten(project(h, inner, bias=bias[DOWN]), x.shape), gate_up, joint
    if s is None:
        s = passes.shrink(h, cast(down.A, adapter_dtype(h, down.A)), down.p, down.seed)
    y = project(h, inner, s, cast(down.B, s.dtype), down.scale, bias=bias[DOWN])
    return unflatten(y, x.shape), gate_up, [*joint, s]


def remake(
    x: Tensor,
    weights: Sequence[Tensor],
    storage: Sequence[int],
    biases: Sequence[Tensor],
    biased: Sequence[int],
    loras: Sequence[LoRA | None],
    s: Sequence[Tensor],
    up: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gate and up as the forward has computed them: the gate alone if ``up`` is given. ``s`` is the last result of the forward."""
    flat, bias = rows(x), with_gaps(biases, biased, 3)
    outer = weights_of(weights, storage)[:DOWN]
    updates: list[Update] = [None, None]
    if not _holds(flat, loras):
        groups = group(loras[:DOWN])
        ss = members_of(s[: len(groups)], loras[:DOWN], groups, 1)
        updates = list(zip(ss, loras, strict=False))
    if up is not None:
        return _project(flat, outer[0], bias[0], updates[0]), up
    gate, up = _halves(_gate_and_up(flat, outer, bias[:DOWN], updates))
    return gate, up


Update = tuple[Tensor | None, LoRA | None] | None
"""``drop(x) Aᵀ`` and the adapter of a linear that adds its update to its product; ``None`` if the gate's kernels add it."""
_NO_UPDATES = [None] * DOWN, [None] * (DOWN + 1)
"""The arguments ``s`` and ``loras`` of the gate's kernels if gate and up contain their updates."""


def _holds(x: Tensor, loras: Sequence[LoRA | None]) -> bool:
    """Whether the gate's kernels compute the updates of gate and up and the shrink of down."""
    ranks = [lora.A.shape[0] for lora in loras if lora is not None]
    return holds(max([0, *ranks]), x.element_size())


def _project(
    x: Tensor, weight: Weight, bias: Tensor | None, update: Update, out: Tensor | None = None
) -> Tensor:
    s, lora = update or (None, None)
    if s is None or lora is None:
        return project(x, weight, bias=bias, out=out)
    return project(x, weight, s, cast(lora.B, s.dtype), lora.scale, bias=bias, out=out)


def _gate_and_up(
    x: Tensor, weights: Sequence[Weight], biases: Tensors, updates: Sequence[Update]
) -> Tensor:
    """``x Wᵀ + bias`` of gate and up, ``[M, 2F]``, with their updates."""
    out = x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))
    present = [cast(bias, x.dtype) for bias in biases if bias is not None]
    in_8_bits = isinstance(weights[0], Int8ComputeWeight)
    if len(present) != 1 and updates == [None, None] and not in_8_bits:
        both = stacked_triton(weights, x.dtype)
        if both is not None:
            return project(x, both, bias=torch.cat(present) if present else None, out=out)
    for arguments in zip(weights, biases, updates, _halves(out), strict=True):
        _project(x, *arguments)
    return out


def _halves(gate_up: Tensor) -> Sequence[Tensor]:
    return gate_up.split(gate_up.shape[1] // 2, 1)


def _empty_outputs(
    x: Tensor,
    weights: Sequence[Tensor],
    storage: Sequence[int],
    biases: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    biased: Sequence[int],
    adapted: Sequence[int],
    scales: Sequence[float],
    ps: Sequence[float],
    seeds: Sequence[int],
    act: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    loras = loras_of(3, As, Bs, adapted, scales, ps, seeds)
    M, parts = x.shape[:-1].numel(), weights_of(weights, storage)
    s = qkv.joint_like(x, M, loras[:DOWN]) + qkv.joint_like(x, M, loras[DOWN:])
    y = x.new_empty(*x.shape[:-1], parts[DOWN].shape[0])
    return y, x.new_empty(M, 2 * parts[0].shape[0]), s


def backward(
    dy: Tensor,
    weights: Sequence[Tensor],
    storage: Sequence[int],
    x: Tensor | None,
    gate_up: Tensor | tuple[Tensor, Tensor] | None,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    s: Tensors,
    adapted: Sequence[int],
    scales: Sequence[float],
    ps: Sequence[float],
    seeds: Sequence[int],
    act: str,
    needs_x: bool,
    needs_bias: Sequence[bool],
    needs_A: Sequence[bool],
    needs_B: Sequence[bool],
) -> list[Tensor]:
    """The gradients that are needed, in this order: ``dx``; dbias of gate and up; the dA's; the dB's.

    ``gate_up`` is what the forward has kept, or what ``remake`` returns.
    """
    wanted = needs_x, needs_bias, needs_A, needs_B
    numbers = adapted, scales, ps, seeds
    if not dy.numel():
        grads = _like_grads(dy, weights, storage, x, gate_up, As, Bs, s, *numbers, act, *wanted)
        return [grad.zero_() for grad in grads]
    flat, loras = rows(dy), loras_of(3, As, Bs, *numbers)
    *first, inner = weights_of(weights, storage)
    outer, groups, down = sum(i < DOWN for i in adapted), group(loras[:DOWN]), loras[DOWN]
    needs_outer = needs_x or any(needs_bias) or any(needs_A[:outer]) or any(needs_B[:outer])
    needs_dA = any(needs_A[outer:])
    dB = ds = dA = None
    if down is not None:
        ds = flat.new_empty(flat.shape[0], down.A.shape[0], dtype=adapter_dtype(flat, down.A))
        needs_ds = needs_outer or needs_dA
        sums = passes.Sums()
        (dB,) = qkv.grads_at_output([flat], s[-1:], [ds], [down], needs_B[outer:], needs_ds, sums)
        sums.finish()
    found: list[Tensor] = []
    if gate_up is not None:
        gate, up = gate_up if isinstance(gate_up, tuple) else _halves(gate_up)
        joint = s[: len(groups)]
        ss = members_of(joint, loras[:DOWN], groups, 1)
        inside = _holds(flat, loras)
        if needs_outer:
            W, sums = dense_triton(inner, dy.dtype), passes.Sums()
            if inside or down is None or ds is None:
                dh = flat @ W
            else:
                numbers_of_down = {"p": down.p, "seed": down.seed}
                dh = project(flat, W.t(), ds, cast(down.A, ds.dtype).t(), **numbers_of_down)
            s_gate, of_gate = (ss, loras) if inside else _NO_UPDATES
            rest = {"needs_dA": needs_dA and inside, "sums": sums}
            d_gate, d_up, dA = gate_backward(
                dh, gate, up, s_gate, ds if inside else None, of_gate, act, **rest
            )
            found = qkv.backward(
                *([d_gate, d_up], *arguments_of(first), x, As[:outer], Bs[:outer], joint),
                *(values[:outer] for values in numbers),
                *(needs_x, needs_A[:outer], needs_B[:outer]),
                sums=sums,
            )
            bias_grads = [
                d.sum(0) for d, needed in zip((d_gate, d_up), needs_bias, strict=True) if needed
            ]
            found[needs_x:needs_x] = bias_grads
        if needs_dA and down is not None and dA is None:
            updates = (ss, [*loras[:DOWN], None]) if inside else _NO_UPDATES
            h, _ = gate_forward(gate, up, *updates, act)
            dA = passes.grad_a(ds, h, down.A.dtype, down.p, down.seed)
    if found and needs_x:
        found[0] = unflatten(found[0], torch.Size((*dy.shape[:-1], found[0].shape[-1])))
    # the dA of down follows those of gate and up, before their dB's
    place = len(found) - sum(needs_B[:outer])
    found[place:place] = [] if dA is None else [dA]
    return found + ([] if dB is None else [dB])


def _like_grads(
    dy: Tensor,
    weights: Sequence[Tensor],
    storage: Sequence[int],
    x: Tensor | None,
    gate_up: Any,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    s: Tensors,
    adapted: Sequence[int],
    scales: Sequence[float],
    ps: Sequence[float],
    seeds: Sequence[int],
    act: str,
    needs_x: bool,
    needs_bias: Sequence[bool],
    needs_A: Sequence[bool],
    needs_B: Sequence[bool],
) -> list[Tensor]:
    F, D = weights_of(weights, storage)[0].shape
    grads = [dy.new_empty(*dy.shape[:-1], D)] if needs_x else []
    grads += [dy.new_empty(F) for needed in needs_bias if needed]
    factors = zip((*As, *Bs), (*needs_A, *needs_B), strict=True)
    return grads + [t.new_empty(t.shape) for t, needed in factors if needed]


_NUMBERS = "int[] adapted, float[] scales, float[] ps, int[] seeds, str act"


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weights, storage, biases, As, Bs, biased, *numbers = inputs
    _, gate_up, s = output
    outer = sum(i < DOWN for i in numbers[0])
    trained = [
        *As[:outer],
        *Bs[:outer],
        *(b for i, b in zip(biased, biases, strict=True) if i < DOWN),
    ]
    needs_gate = x.requires_grad or any(t.requires_grad for t in (*trained, *As[outer:]))
    needs_down = any(B.requires_grad for B in Bs[outer:])
    groups = len(s) - len(As[outer:])
    kept = [t if needs_gate else None for t in (gate_up, *s[:groups])]
    kept += [t if needs_down else None for t in s[groups:]]
    ctx.recompute_x, x_parts = recompute.saved_for(x, any(A.requires_grad for A in As[:outer]))
    ctx.save_for_backward(*weights, *As, *Bs, *kept, *x_parts)
    ctx.counts, ctx.biased = (len(weights), len(As), len(kept)), biased
    ctx.storage, ctx.numbers = storage, numbers


def _backward(ctx: Any, needs: Sequence[Any], dy: Tensor) -> tuple[Any, ...]:
    stored, adapters, count = ctx.counts
    weights, As, Bs, kept, x_parts = split(ctx.saved_tensors, stored, adapters, adapters, count)
    gate_up, s = kept[0], kept[1:]
    needs_x, needs_bias, needs_A, needs_B = needs
    bias = with_gaps(needs_bias, ctx.biased, 3)
    wanted = needs_x, [bool(needed) for needed in bias[:DOWN]], list(needs_A), list(needs_B)
    grads: list[Tensor] = []
    if needs_x or any((*wanted[1], *needs_A, *needs_B)):
        x = recompute.restore(ctx.recompute_x, x_parts)
        tensors = weights, ctx.storage, x, gate_up, As, Bs, s
        grads = list(_backward_op(dy, *tensors, *ctx.numbers, *wanted))
    dx = grads.pop(0) if needs_x else None
    dbias: list[Tensor | None] = [grads.pop(0) if needed else None for needed in wanted[1]]
    dbias.append(rows(dy).sum(0) if bias[DOWN] else None)
    dA, dB = qkv.factors_of(iter(grads), needs_A, needs_B)
    return dx, [dbias[i] for i in ctx.biased], dA, dB


_forward_op = Op(
    "lora_swiglu_mlp",
    "(Tensor x, Tensor[] weights, int[] storage, Tensor[] biases, Tensor[] As, Tensor[] Bs, int[] biased,"
    f" {_NUMBERS}) -> (Tensor, Tensor, Tensor[])",
    forward,
    _empty_outputs,
    looks_at_storage=("weights",),
)
lora_swiglu_mlp_triton = Differentiable(_forward_op, ("x", "biases", "As", "Bs"), _keep, _backward)
_backward_op = Op(
    "lora_swiglu_mlp_backward",
    "(Tensor dy, Tensor[] weights, int[] storage, Tensor? x, Tensor? gate_up, Tensor[] As, Tensor[] Bs, Tensor?[] s,"
    f" {_NUMBERS}, bool needs_x, bool[] needs_bias, bool[] needs_A, bool[] needs_B) -> Tensor[]",
    backward,
    _like_grads,
    looks_at_storage=("weights",),
)
