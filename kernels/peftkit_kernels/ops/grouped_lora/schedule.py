"""Low-rank updates of many adapters in one batch: the schedule of ``grouped_lora``.

With ``e = ids[m]`` and ``s[m] = A[e] x[m]``:

``ds[m] = scale[e] · dy[m] B[e]``, ``dx[m] = ds[m] A[e]``, ``dA[e] = Σ ds[m]ᵀ x[m]``, ``dB[e] = scale[e] · Σ dy[m]ᵀ s[m]``.

``dy`` is the gradient of ``y``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from peftkit_kernels.core.schedule import Schedule
from peftkit_kernels.low_rank import adapter_dtype, rows, unflatten
from peftkit_kernels.ops.grouped_lora.passes import Table
from peftkit_kernels.ops.grouped_lora.torch_passes import Tiles, TorchPasses
from peftkit_kernels.ops.grouped_lora.triton_passes import TritonPasses

Passes = TorchPasses | TritonPasses


class Grouped(NamedTuple):
    """The arguments: ``[..., K]``, ``[..., N]``, ``[E, R, K]``, ``[E, N, R]``, ``[E]``, and the tables of a plan with rows.

    ``table`` is a ``Tiles`` for torch passes and a ``Table`` for Triton passes.
    """

    x: Tensor
    y: Tensor
    A: Tensor
    B: Tensor
    scale: Tensor
    table: Any


class Kept(NamedTuple):
    """What the backward needs: ``x`` for dA, ``s`` for dB."""

    x: Tensor | None
    s: Tensor | None
    A: Tensor
    B: Tensor
    scale: Tensor
    table: Any


class Grads(NamedTuple):
    """The tensors that may need a gradient, their gradients, or whether each is needed."""

    x: Any
    y: Any
    A: Any
    B: Any


def forward(P: Passes, call: Grouped) -> tuple[Tensor, Tensor]:
    """``y[m] + scale[e] · B[e] s[m]``, and ``s``."""
    x, y, A, B, scale, table = call
    scale = P.scales(scale, table, adapter_dtype(x, A))
    s = P.shrink(P.gather(rows(x), table), A, table)
    out = P.update(rows(y), s, B, scale, table)
    return unflatten(out, y.shape), s


def trained(call: Grouped) -> Grads:
    """All but the scales."""
    return Grads(*call[:4])


def keep(call: Grouped, out: Tensor, s: Tensor, needs: Grads) -> Kept:
    """What the backward needs."""
    return Kept(call.x if needs.A else None, s if needs.B else None, *call[2:])


def backward(P: Passes, kept: Kept, dy: Tensor, needs: Grads) -> Grads:
    """The gradients that are needed, by the formulas of this module."""
    x, s, A, B, scale, table = kept
    dx = dA = dB = None
    if needs.x or needs.A or needs.B:
        flat = P.gather(rows(dy), table)
        scale = P.scales(scale, table, adapter_dtype(dy, A))
        if needs.B and s is not None:
            dB = P.grad_b(flat, s, B, scale, table)
        if needs.x or needs.A:
            ds = P.grad_s(flat, B, scale, table)
            if needs.x:
                dx = unflatten(P.grad_x(ds, A, table, dy.dtype), dy.shape)
            if needs.A and x is not None:
                dA = P.grad_a(P.gather(rows(x), table), ds, A, table)
    return Grads(dx, dy if needs.y else None, dA, dB)


def like(call: Grouped) -> tuple[Tensor, Tensor]:
    """Uninitialised results of ``forward``."""
    x, y, A = call.x, call.y, call.A
    s = x.new_empty(x.shape[:-1].numel(), A.shape[1], dtype=adapter_dtype(x, A))
    return y.new_empty(y.shape), s


def like_grads(kept: Kept, dy: Tensor, needs: Grads) -> Grads:
    """Uninitialised results of ``backward``."""
    A, B = kept.A, kept.B
    return Grads(
        dy.new_empty(*dy.shape[:-1], A.shape[2]) if needs.x else None,
        dy if needs.y else None,
        A.new_empty(A.shape) if needs.A else None,
        B.new_empty(B.shape) if needs.B else None,
    )


grouped_lora = Schedule(
    "grouped_lora",
    TorchPasses,
    TritonPasses,
    forward=forward,
    keep=keep,
    backward=backward,
    trained=trained,
    like=like,
    like_grads=like_grads,
    tuples=(Grouped, Kept, Grads, Tiles, Table),
)
