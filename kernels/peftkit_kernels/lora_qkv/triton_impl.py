"""``lora_qkv`` by Triton kernels around the library's GEMMs: one shrink, one dA pass, one dx accumulated in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels import remake
from peftkit_kernels.autograd import once_differentiable
from peftkit_kernels.lora_linear.torch_impl import unflatten
from peftkit_kernels.lora_linear.triton_impl import project
from peftkit_kernels.lora_qkv.torch_impl import make_loras
from peftkit_kernels.low_rank import LoRA, cast, passes, rows
from peftkit_kernels.low_rank.groups import (
    Groups,
    add_updates,
    grads_of_a,
    group,
    members_of,
    rank_of,
    shrink_groups,
)

Tensors = Sequence[Tensor | None]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + bias`` by the library, in the dtype of ``x``."""
    bias = None if bias is None else cast(bias, x.dtype)
    return torch.nn.functional.linear(x, cast(weight, x.dtype), bias)


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Tensors,
    As: Tensors,
    Bs: Tensors,
    scales: Sequence[float],
    ps: Sequence[float],
    seeds: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of ``lora_qkv``, and ``drop(x) Aᵀ`` of every group of adapters, ``[M, ΣR]``."""
    if not x.numel():
        return _empty_outputs(x, weights, biases, As, Bs, scales, ps, seeds)
    flat, loras = rows(x), _loras(As, Bs, scales, ps, seeds)
    groups = group(loras)
    joint = shrink_groups(flat, loras, groups)
    ys = []
    for weight, bias, s, lora in zip(
        weights, biases, members_of(joint, loras, groups, 1), loras, strict=True
    ):
        if lora is None or s is None:
            y = linear(flat, weight, bias)
        else:
            bias = None if bias is None else cast(bias, x.dtype)
            W, B = cast(weight, x.dtype), cast(lora.B, x.dtype)
            y = project(flat, W, s, B, lora.scale, bias=bias)
        ys.append(unflatten(y, x.shape))
    return ys, joint


def _empty_outputs(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Tensors,
    As: Tensors,
    Bs: Tensors,
    scales: Sequence[float],
    ps: Sequence[float],
    seeds: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    loras = _loras(As, Bs, scales, ps, seeds)
    M = x.shape[:-1].numel()
    ys = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    return ys, [x.new_empty(M, rank_of(loras, members)) for members in group(loras)]


def backward(
    dys: Tensors,
    weights: Sequence[Tensor],
    x: Tensor | None,
    As: Tensors,
    Bs: Tensors,
    joint: Tensors,
    scales: Sequence[float],
    ps: Sequence[float],
    seeds: Sequence[int],
    needs_x: bool,
    needs_A: bool,
    needs_B: Sequence[bool],
) -> list[Tensor]:
    """``dx`` if needed, dA of every group (``[ΣR, K]``) if any is needed, and the needed dB's, in this order.

    What belongs to an output without gradient is zero.
    """
    present = [dy for dy in dys if dy is not None]
    if not present[0].numel():
        grads = _like_grads(
            dys, weights, x, As, Bs, joint, scales, ps, seeds, needs_x, needs_A, needs_B
        )
        return [grad.zero_() for grad in grads]
    loras = _loras(As, Bs, scales, ps, seeds)
    groups = group(loras)
    dtype = present[0].dtype
    flat = [None if dy is None else rows(dy) for dy in dys]
    ss: Tensors = [None] * len(loras)
    if any(needs_B):
        ss = members_of(joint, loras, groups, 1)
    ds = []
    for members in groups:
        new = torch.zeros if any(dys[i] is None for i in members) else torch.empty
        M, R = present[0].shape[:-1].numel(), rank_of(loras, members)
        ds.append(new(M, R, dtype=dtype, device=present[0].device))
    dB = reach(flat, ss, members_of(ds, loras, groups, 1), loras, needs_B, needs_x or needs_A)
    dx = add_updates(None, ds, loras, groups) if needs_x else None
    if needs_x:
        for dy, weight in zip(flat, weights, strict=True):
            if dy is not None:
                W = cast(weight, dtype)
                dx = dy @ W if dx is None else dx.addmm_(dy, W)
    dA = grads_of_a(rows(x), ds, loras, groups) if needs_A and x is not None else []
    grads = [*([] if dx is None else [unflatten(dx, present[0].shape)]), *dA]
    return grads + [grad for grad in dB if grad is not None]


def reach(
    dys: Tensors,
    ss: Tensors,
    ds: Tensors,
    loras: Sequence[LoRA | None],
    needs_B: Sequence[bool],
    needs_ds: bool,
) -> list[Tensor | None]:
    """The dB's that are needed, and ``ds = scale · dy B`` written into ``ds`` where that is."""
    dB: list[Tensor | None] = [None] * len(loras)
    for i, (dy, s, out, lora) in enumerate(zip(dys, ss, ds, loras, strict=True)):
        if lora is None:
            continue
        if dy is None:
            dB[i] = torch.zeros_like(lora.B) if needs_B[i] else None
            continue
        B = cast(lora.B, dy.dtype)
        if needs_B[i] and needs_ds:
            dB[i], _ = passes.grad_b_and_s(dy, s, B, lora.scale, lora.B.dtype, ds=out)
        elif needs_B[i]:
            dB[i] = passes.grad_b(dy, s, lora.scale, lora.B.dtype)
        elif needs_ds:
            passes.grad_s(dy, B, lora.scale, out=out)
    return dB


def _like_grads(
    dys: Tensors,
    weights: Sequence[Tensor],
    x: Tensor | None,
    As: Tensors,
    Bs: Tensors,
    joint: Tensors,
    scales: Sequence[float],
    ps: Sequence[float],
    seeds: Sequence[int],
    needs_x: bool,
    needs_A: bool,
    needs_B: Sequence[bool],
) -> list[Tensor]:
    dy = next(dy for dy in dys if dy is not None)
    loras = _loras(As, Bs, scales, ps, seeds)
    grads = [dy.new_empty(*dy.shape[:-1], weights[0].shape[1])] if needs_x else []
    if needs_A:
        for members in group(loras):
            A = loras[members[0]].A  # pyright: ignore[reportOptionalMemberAccess]
            grads.append(A.new_empty(rank_of(loras, members), A.shape[1]))
    return grads + [
        B.new_empty(B.shape)
        for B, needed in zip(Bs, needs_B, strict=True)
        if B is not None and needed
    ]


def _loras(
    As: Tensors, Bs: Tensors, scales: Sequence[float], ps: Sequence[float], seeds: Sequence[int]
) -> list[LoRA | None]:
    return make_loras(As, Bs, list(zip(scales, ps, seeds, strict=True)))


_ADAPTERS = "Tensor?[] As, Tensor?[] Bs, {joint}float[] scales, float[] ps, int[] seeds"
lora_qkv_triton = torch.library.custom_op(
    "peftkit::lora_qkv",
    forward,
    mutates_args=(),
    schema=f"(Tensor x, Tensor[] weights, Tensor?[] biases, {_ADAPTERS.format(joint='')}) -> (Tensor[], Tensor[])",
)
_backward_op = torch.library.custom_op(
    "peftkit::lora_qkv_backward",
    backward,
    mutates_args=(),
    schema=f"(Tensor?[] dys, Tensor[] weights, Tensor? x, {_ADAPTERS.format(joint='Tensor?[] joint, ')},"
    " bool needs_x, bool needs_A, bool[] needs_B) -> Tensor[]",
)


def _keep(ctx: Any, inputs: tuple, output: tuple[list[Tensor], list[Tensor]]) -> None:
    x, weights, _, As, Bs, *numbers = inputs
    ctx.make_x, x_parts = remake.kept(x, any(A is not None and A.requires_grad for A in As))
    joint = output[1]
    needed = any(B is not None and B.requires_grad for B in Bs)
    ctx.save_for_backward(*weights, *As, *Bs, *(s if needed else None for s in joint), *x_parts)
    ctx.counts, ctx.numbers = (len(weights), len(joint)), numbers
    ctx.mark_non_differentiable(*joint)
    ctx.set_materialize_grads(False)


def _split(saved: Sequence[Any], *counts: int) -> list[list[Any]]:
    """``saved`` in pieces of these lengths, and the rest."""
    parts, start = [], 0
    for count in counts:
        parts.append(list(saved[start : start + count]))
        start += count
    return [*parts, list(saved[start:])]


@once_differentiable
def _backward(ctx: Any, dys: Tensors, _: Any) -> tuple[Any, ...]:
    count, joints = ctx.counts
    weights, As, Bs, joint, x_parts = _split(ctx.saved_tensors, count, count, count, joints)
    needs_x, _, needs_bias, needs_A, needs_B, *_ = ctx.needs_input_grad
    nothing = [None] * count
    if all(dy is None for dy in dys):
        return (None, nothing, nothing, nothing, nothing, None, None, None)
    dbias = [
        rows(dy).sum(0) if needed and dy is not None else None
        for dy, needed in zip(dys, needs_bias, strict=True)
    ]
    x = remake.again(ctx.make_x, x_parts)
    grads = _backward_op(
        dys, weights, x, As, Bs, joint, *ctx.numbers, needs_x, any(needs_A), needs_B
    )
    dx = grads.pop(0) if needs_x else None
    loras = _loras(As, Bs, *ctx.numbers)
    groups: Groups = group(loras) if any(needs_A) else []
    dA = members_of(grads[: len(groups)], loras, groups, 0)
    found = iter(grads[len(groups) :])
    dB = [next(found) if needed else None for needed in needs_B]
    dA = [part if needed else None for part, needed in zip(dA, needs_A, strict=True)]
    return dx, nothing, dbias, dA, dB, None, None, None


lora_qkv_triton.register_fake(_empty_outputs)
_backward_op.register_fake(_like_grads)
lora_qkv_triton.register_autograd(_backward, setup_context=_keep)
