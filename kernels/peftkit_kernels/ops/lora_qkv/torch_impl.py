"""``lora_qkv`` from torch ops: one shrink and one dA pass for all projections, one dx accumulated in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkit_kernels import low_rank
from peftkit_kernels.core import recompute
from peftkit_kernels.core.autograd import once_differentiable
from peftkit_kernels.gemm import addmm_nn, matmul_nn
from peftkit_kernels.low_rank import LoRA, cast, rows
from peftkit_kernels.ops.lora_linear.torch_impl import add_update_grad, project, unflatten
from peftkit_kernels.storage.quantized import dense, weights_of

Numbers = tuple[float, float, int]


class Call(NamedTuple):
    """The arguments of the autograd function that are not tensors.

    Attributes:
        numbers: ``(scale, p, seed)`` of each projection, or ``None`` if it has no adapter.
        storage: How the weights are stored, as from ``arguments_of``.
    """

    numbers: tuple[Numbers | None, ...]
    storage: list[int]


def joins_shrinks(rows: int, ranks: Sequence[int]) -> bool:
    """Whether adapters of these ranks share one product with their concatenated A's.

    They do if this moves fewer bytes: it reads ``x [rows, K]`` once instead of n times, but copies the A's.
    """
    return (len(ranks) - 1) * rows > 2 * sum(ranks)


def shared_shrink(x: Tensor, loras: Sequence[LoRA | None]) -> list[Tensor | None]:
    """``drop(x) Aᵀ`` of every adapter; one product for those without dropout if ``joins_shrinks`` says so."""
    s: list[Tensor | None] = [None] * len(loras)
    shared = [(i, lora.A) for i, lora in enumerate(loras) if lora is not None and lora.p == 0.0]
    ranks = [A.shape[0] for _, A in shared]
    # one read of x for all of them, if it saves more than copying the A's costs
    if joins_shrinks(x.shape[0], ranks):
        joint = low_rank.shrink(x, torch.cat([A for _, A in shared]))
        for (i, _), part in zip(shared, joint.split(ranks, dim=1), strict=True):
            s[i] = part
    for i, lora in enumerate(loras):
        if lora is not None and s[i] is None:
            s[i] = low_rank.shrink(x, lora.A, lora.p, lora.seed)
    return s


def shared_grads(
    dx: Tensor | None, x: Tensor | None, ds: Sequence[Tensor | None], loras: Sequence[LoRA | None]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Add every adapter's update to ``dx`` and compute every dA. Adapters without dropout share one product for either.

    Args:
        dx: ``[M, K]``, changed in place; ``None`` if the input needs no gradient.
        x: ``[M, K]``; ``None`` if no A needs a gradient.
        ds: ``[M, R]`` for each adapter, already scaled.
        loras: The adapters.
    """
    dA: list[Tensor | None] = [None] * len(loras)
    shared = [
        i
        for i, lora in enumerate(loras)
        if lora is not None and ds[i] is not None and lora.p == 0.0
    ]
    if shared:
        adapters = [loras[i] for i in shared]
        joint = torch.cat([ds[i] for i in shared], dim=1)
        if dx is not None:
            low_rank.expand_grad_(dx, joint, torch.cat([lora.A for lora in adapters]))
        if x is not None:
            grads = low_rank.grad_a(joint, x, joint.dtype)
            parts = grads.split([lora.A.shape[0] for lora in adapters])
            for i, lora, part in zip(shared, adapters, parts, strict=True):
                dA[i] = cast(part, lora.A.dtype)
    # an adapter with dropout has its own mask, and therefore its own products
    for i, lora in enumerate(loras):
        if lora is None or ds[i] is None or lora.p == 0.0:
            continue
        if dx is not None:
            dx = add_update_grad(dx, ds[i], lora)
        if x is not None:
            dA[i] = low_rank.grad_a(ds[i], x, lora.A.dtype, lora.p, lora.seed)
    return dx, dA


class LoRAQKV(torch.autograd.Function):
    """The chain rule of ``lora_linear`` for each projection; ``dx`` is the sum over the projections.

    The tensors are passed in one flat list: ``x``, then biases, A's and B's of all projections (``None`` if missing), then those of
    the weights.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        count = len(call.numbers)
        biases, As, Bs = (tensors[i * count : (i + 1) * count] for i in range(3))
        stored: Any = tensors[3 * count :]
        weights = weights_of(stored, call.storage)
        loras = make_loras(As, Bs, call.numbers)
        flat = rows(x)
        s = shared_shrink(flat, loras)
        ys = [project(flat, *parts) for parts in zip(weights, biases, s, loras, strict=True)]
        needs = ctx.needs_input_grad[2:]
        ctx.recompute_x, x_parts = recompute.saved_for(x, any(needs[count : 2 * count]))
        ctx.save_for_backward(*As, *Bs, *s, *stored, *x_parts)
        ctx.call, ctx.shape, ctx.stored = call, x.shape, len(stored)
        # an output that was not used has no gradient, so backward can skip it
        ctx.set_materialize_grads(False)
        return tuple(unflatten(y, x.shape) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        count = len(ctx.call.numbers)
        As, Bs, ss = (saved[i * count : (i + 1) * count] for i in range(3))
        end = 3 * count + ctx.stored
        weights = weights_of(saved[3 * count : end], ctx.call.storage)
        x = recompute.restore(ctx.recompute_x, saved[end:])
        loras = make_loras(As, Bs, ctx.call.numbers)
        needs = ctx.needs_input_grad[2:]
        flat = [None if dy is None else rows(dy) for dy in dys]
        dx = None
        dbias, dB, ds = ([None] * count for _ in range(3))
        for i, dy in enumerate(flat):
            if dy is None:
                continue
            if needs[i]:
                dbias[i] = dy.sum(0)
            if loras[i] is not None:
                ds[i] = low_rank.grad_s(dy, Bs[i], loras[i].scale)
                if needs[2 * count + i]:
                    dB[i] = low_rank.grad_b(dy, ss[i], loras[i].scale, Bs[i])
            if ctx.needs_input_grad[1]:
                weight = dense(weights[i], dy.dtype)
                dx = matmul_nn(dy, weight) if dx is None else addmm_nn(dx, dy, weight)
        dx, dA = shared_grads(dx, None if x is None else rows(x), ds, loras)
        return (
            None,
            None if dx is None else unflatten(dx, ctx.shape),
            *dbias,
            *dA,
            *dB,
            *[None] * ctx.stored,
        )


def make_loras(
    As: Sequence[Tensor | None], Bs: Sequence[Tensor | None], numbers: Sequence[Numbers | None]
) -> list[LoRA | None]:
    """The adapters, from their tensors and numbers."""
    return [
        LoRA(A, B, *values) if A is not None and B is not None and values is not None else None
        for A, B, values in zip(As, Bs, numbers, strict=True)
    ]
