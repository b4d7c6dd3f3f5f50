"""``lora_qkv`` by Triton kernels around the library's GEMMs: one shrink, one dA pass, one dx accumulated in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core import recompute
from peftkit_kernels.core.op import Differentiable, Op
from peftkit_kernels.core.views import as_one_view
from peftkit_kernels.low_rank import LoRA, adapter_dtype, cast, passes, rows
from peftkit_kernels.low_rank.groups import (
    add_updates,
    grads_of_a,
    group,
    members_of,
    rank_of,
    shrink_groups,
)
from peftkit_kernels.ops.lora_linear.torch_impl import unflatten
from peftkit_kernels.ops.lora_linear.triton_impl import project
from peftkit_kernels.storage.quantized import Weight, dense_triton, stacked_triton, weights_of

Tensors = Sequence[Tensor | None]


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
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of ``lora_qkv``, and ``drop(x) Aᵀ`` of every group of adapters, ``[M, ΣR]``.

    ``weights`` and ``storage`` come from ``arguments_of``, here and in every function with arguments of these names. torch.library does not differentiate lists of tensors that contain ``None``. So ``biases``, ``As`` and ``Bs`` have no gaps,
    and ``biased`` and ``adapted`` are the indices of the projections that have a bias or an adapter.
    """
    if not x.numel():
        numbers = adapted, scales, ps, seeds
        return _empty_outputs(x, weights, storage, biases, As, Bs, biased, *numbers)
    loras = loras_of(len(weights_of(weights, storage)), As, Bs, adapted, scales, ps, seeds)
    joint = shrink_groups(rows(x), loras, group(loras))
    return outputs(x, weights, storage, biases, biased, loras, joint), joint


def outputs(
    x: Tensor,
    weights: Sequence[Tensor],
    storage: Sequence[int],
    biases: Sequence[Tensor],
    biased: Sequence[int],
    loras: Sequence[LoRA | None],
    joint: Sequence[Tensor],
) -> list[Tensor]:
    """The outputs of ``forward``, from ``x`` and ``drop(x) Aᵀ`` of every group."""
    parts, flat, ys = weights_of(weights, storage), rows(x), []
    for weight, bias, s, lora in zip(
        parts,
        with_gaps(biases, biased, len(parts)),
        members_of(joint, loras, group(loras), 1),
        loras,
        strict=True,
    ):
        if lora is None or s is None:
            y = project(flat, weight, bias=bias)
        else:
            y = project(flat, weight, s, cast(lora.B, s.dtype), lora.scale, bias=bias)
        ys.append(unflatten(y, x.shape))
    return ys


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
) -> tuple[list[Tensor], list[Tensor]]:
    parts = weights_of(weights, storage)
    loras = loras_of(len(parts), As, Bs, adapted, scales, ps, seeds)
    M = x.shape[:-1].numel()
    ys = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in parts]
    return ys, joint_like(x, M, loras)


def joint_like(x: Tensor, M: int, loras: Sequence[LoRA | None]) -> list[Tensor]:
    """An uninitialised ``[M, ΣR]`` for ``drop(x) Aᵀ`` of every group of adapters."""
    return [
        x.new_empty(M, rank_of(loras, members), dtype=adapter_dtype(x, loras[members[0]].A))  # pyright: ignore[reportOptionalMemberAccess]
        for members in group(loras)
    ]


def backward(
    dys: Tensors,
    weights: Sequence[Tensor],
    storage: Sequence[int],
    x: Tensor | None,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    joint: Tensors,
    adapted: Sequence[int],
    scales: Sequence[float],
    ps: Sequence[float],
    seeds: Sequence[int],
    needs_x: bool,
    needs_A: Sequence[bool],
    needs_B: Sequence[bool],
    *,
    sums: passes.Sums | None = None,
) -> list[Tensor]:
    """``dx`` if needed, the needed dA's, and the needed dB's, in this order. The dA's of a group are parts of one tensor.

    The gradients of an adapter whose output has no gradient are zero. The sums that ``sums`` already has are computed too.
    """
    present = [dy for dy in dys if dy is not None]
    if not present[0].numel():
        grads = _like_grads(
            *(dys, weights, storage, x, As, Bs, joint, adapted, scales, ps, seeds),
            *(needs_x, needs_A, needs_B),
        )
        return [grad.zero_() for grad in grads]
    loras = loras_of(len(dys), As, Bs, adapted, scales, ps, seeds)
    groups = group(loras)
    dtype = present[0].dtype
    flat = [None if dy is None else rows(dy) for dy in dys]
    ss: Tensors = [None] * len(loras)
    if any(needs_B):
        ss = members_of(joint, loras, groups, 1)
    ds = joint_like(present[0], present[0].shape[:-1].numel(), loras)
    for members, part in zip(groups, ds, strict=True):
        # no pass writes the columns of an output without gradient, but the passes over the group read them
        if any(dys[i] is None for i in members):
            part.zero_()
    needed = with_gaps(needs_B, adapted, len(loras))
    sums = passes.Sums() if sums is None else sums
    dB = grads_at_output(
        flat, ss, members_of(ds, loras, groups, 1), loras, needed, needs_x or any(needs_A), sums
    )
    sums.finish()
    # the updates before the products: the GEMMs then add to dx in place
    dx = add_updates(None, ds, loras, groups, dtype) if needs_x else None
    if needs_x:
        for dy, W in _products(flat, weights_of(weights, storage), dtype):
            dx = dy @ W if dx is None else dx.addmm_(dy, W)
    grads = [] if dx is None else [unflatten(dx, present[0].shape)]
    if any(needs_A) and x is not None:
        dA: Any = members_of(grads_of_a(rows(x), ds, loras, groups), loras, groups, 0)
        grads += [dA[i] for i, needed in zip(adapted, needs_A, strict=True) if needed]
    return grads + [grad for grad in dB if grad is not None]


def _products(
    dys: Tensors, weights: Sequence[Weight], dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs ``(dy, W)`` whose products add up to dx: one pair if gradients and weights are each parts of one buffer.

    A decoded ``W`` is valid until the next pair is made.
    """
    present = [(dy, weight) for dy, weight in zip(dys, weights, strict=True) if dy is not None]
    left = as_one_view([dy for dy, _ in present], 1)
    right = None if left is None else stacked_triton([weight for _, weight in present], dtype)
    if left is not None and right is not None:
        yield left, right
        return
    for dy, weight in present:
        yield dy, dense_triton(weight, dtype)


def grads_at_output(
    dys: Tensors,
    ss: Tensors,
    ds: Tensors,
    loras: Sequence[LoRA | None],
    needs_B: Sequence[bool],
    needs_ds: bool,
    sums: passes.Sums,
) -> list[Tensor | None]:
    """The dB's that are needed. With ``needs_ds``, ``scale · dy B`` is written into ``ds``. Both are undefined until ``sums.finish()``."""
    dB: list[Tensor | None] = [None] * len(loras)
    for i, (dy, s, out, lora) in enumerate(zip(dys, ss, ds, loras, strict=True)):
        if lora is None:
            continue
        if dy is None:
            dB[i] = torch.zeros_like(lora.B) if needs_B[i] else None
            continue
        B = cast(lora.B, adapter_dtype(dy, lora.B))
        if needs_B[i] and needs_ds:
            dB[i], _ = passes.grad_b_and_s(dy, s, B, lora.scale, lora.B.dtype, ds=out, sums=sums)
        elif needs_B[i]:
            dB[i] = passes.grad_b(dy, s, lora.scale, lora.B.dtype, sums=sums)
        elif needs_ds:
            passes.grad_s(dy, B, lora.scale, out=out, sums=sums)
    return dB


def _like_grads(
    dys: Tensors,
    weights: Sequence[Tensor],
    storage: Sequence[int],
    x: Tensor | None,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    joint: Tensors,
    adapted: Sequence[int],
    scales: Sequence[float],
    ps: Sequence[float],
    seeds: Sequence[int],
    needs_x: bool,
    needs_A: Sequence[bool],
    needs_B: Sequence[bool],
) -> list[Tensor]:
    dy = next(dy for dy in dys if dy is not None)
    width = weights_of(weights, storage)[0].shape[1]
    grads = [dy.new_empty(*dy.shape[:-1], width)] if needs_x else []
    factors = zip((*As, *Bs), (*needs_A, *needs_B), strict=True)
    return grads + [t.new_empty(t.shape) for t, needed in factors if needed]


def with_gaps(parts: Sequence[Any], where: Sequence[int], count: int) -> list[Any]:
    """A list of length ``count`` with ``parts`` at the indices ``where`` and ``None`` elsewhere."""
    full: list[Any] = [None] * count
    for i, part in zip(where, parts, strict=True):
        full[i] = part
    return full


def loras_of(
    count: int,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    adapted: Sequence[int],
    scales: Sequence[float],
    ps: Sequence[float],
    seeds: Sequence[int],
) -> list[LoRA | None]:
    """The adapters of ``count`` linears, ``None`` for one without, from the form that the ops take."""
    parts = zip(As, Bs, scales, ps, seeds, strict=True)
    return with_gaps([LoRA(*values) for values in parts], adapted, count)


_NUMBERS = "int[] adapted, float[] scales, float[] ps, int[] seeds"


def _keep(ctx: Any, inputs: tuple, output: tuple[list[Tensor], list[Tensor]]) -> None:
    x, weights, storage, _, As, Bs, biased, *numbers = inputs
    ctx.recompute_x, x_parts = recompute.saved_for(x, any(A.requires_grad for A in As))
    joint = output[1]
    needed = any(B.requires_grad for B in Bs)
    ctx.save_for_backward(*weights, *As, *Bs, *(s if needed else None for s in joint), *x_parts)
    ctx.counts, ctx.biased = (len(weights), len(As), len(joint)), biased
    ctx.storage, ctx.numbers = storage, numbers


def factors_of(
    grads: Iterator[Tensor], needs_A: Sequence[bool], needs_B: Sequence[bool]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The dA and dB of each adapter, ``None`` where not needed, from what ``backward`` returns after dx."""
    dA = [next(grads) if needed else None for needed in needs_A]
    return dA, [next(grads) if needed else None for needed in needs_B]


def split(saved: Sequence[Any], *counts: int) -> list[list[Any]]:
    """``saved`` cut into pieces of these lengths, and the rest."""
    parts, start = [], 0
    for count in counts:
        parts.append(list(saved[start : start + count]))
        start += count
    return [*parts, list(saved[start:])]


def _backward(ctx: Any, needs: Sequence[Any], dys: Tensors) -> tuple[Any, ...]:
    count, adapters, joints = ctx.counts
    weights, As, Bs, joint, x_parts = split(ctx.saved_tensors, count, adapters, adapters, joints)
    needs_x, needs_bias, needs_A, needs_B = needs
    dx, dA, dB, dbias = None, [None] * adapters, [None] * adapters, [None] * len(ctx.biased)
    if any(dy is not None for dy in dys):
        x = recompute.restore(ctx.recompute_x, x_parts)
        wanted = needs_x, list(needs_A), list(needs_B)
        tensors = weights, ctx.storage, x, As, Bs, joint
        found = iter(_backward_op(dys, *tensors, *ctx.numbers, *wanted))
        dx = next(found) if needs_x else None
        dA, dB = factors_of(found, needs_A, needs_B)
    for j, (i, needed) in enumerate(zip(ctx.biased, needs_bias, strict=True)):
        if needed and dys[i] is not None:
            dbias[j] = rows(dys[i]).sum(0)
    return dx, dbias, dA, dB


_forward_op = Op(
    "lora_qkv",
    "(Tensor x, Tensor[] weights, int[] storage, Tensor[] biases, Tensor[] As, Tensor[] Bs, int[] biased,"
    f" {_NUMBERS}) -> (Tensor[], Tensor[])",
    forward,
    _empty_outputs,
    looks_at_storage=("weights",),
)
lora_qkv_triton = Differentiable(_forward_op, ("x", "biases", "As", "Bs"), _keep, _backward)
_backward_op = Op(
    "lora_qkv_backward",
    "(Tensor?[] dys, Tensor[] weights, int[] storage, Tensor? x, Tensor[] As, Tensor[] Bs, Tensor?[] joint,"
    f" {_NUMBERS}, bool needs_x, bool[] needs_A, bool[] needs_B) -> Tensor[]",
    backward,
    _like_grads,
    looks_at_storage=("dys", "weights"),
)


def without_gaps(biases: Tensors, loras: Sequence[LoRA | None]) -> tuple[list[Any], ...]:
    """Biases and adapters in the form that the ops take: tensors without gaps, their indices, and the adapters' numbers."""
    present = [lora for lora in loras if lora is not None]
    return (
        [bias for bias in biases if bias is not None],
        [lora.A for lora in present],
        [lora.B for lora in present],
        [i for i, bias in enumerate(biases) if bias is not None],
        [i for i, lora in enumerate(loras) if lora is not None],
        [lora.scale for lora in present],
        [lora.p for lora in present],
        [lora.seed for lora in present],
    )
