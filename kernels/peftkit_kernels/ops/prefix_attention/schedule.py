"""Attention with a prefix: the schedule of ``prefix_attention``. Keys and scores are never concatenated.

With ``L = log(exp(l1) + exp(l2))``: ``out = o1 exp(l1 - L) + o2 exp(l2 - L)``.

The probabilities of both parts are ``exp(scores - L)``, so the backward of each pass gets ``out`` and ``L`` and returns its part of
the gradient; the two ``dq`` are added. With a gate ``out = o1 + g o2``, each pass has its own log-sum-exp, and
``dg = Σ dout ∘ o2``. The native library needs one pass for both parts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkit_kernels.core.schedule import Schedule
from peftkit_kernels.ops.prefix_attention import one_pass
from peftkit_kernels.ops.prefix_attention.flash import Pass, of_batch, over_batch
from peftkit_kernels.ops.prefix_attention.torch_passes import TorchPasses
from peftkit_kernels.ops.prefix_attention.triton_passes import TritonPasses

Passes = TorchPasses | TritonPasses


class Prefixed(NamedTuple):
    """The arguments, as ``prefix_attention`` describes them."""

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    gate: Tensor | None
    mask: Tensor | None
    scale: float
    causal: bool


class Made(NamedTuple):
    """What the forward makes for the backward.

    Attributes:
        is_native: Whether one native pass has computed both parts.
        numbers: The log-sum-exps: of all keys, or if the pass is native, those that it returns.
        parts: With a gate, the output and the log-sum-exp of each pass instead.
    """

    is_native: bool
    numbers: Tensor | None
    parts: list[Tensor]


class Kept(NamedTuple):
    """What the backward needs. ``results`` are the output and its ``numbers``, or the ``parts``."""

    call: Prefixed
    is_native: bool
    results: list[Tensor]


class Grads(NamedTuple):
    """The tensors that may need a gradient, their gradients, or whether each is needed."""

    q: Any
    k: Any
    v: Any
    prefix_k: Any
    prefix_v: Any
    gate: Any


def forward(P: Passes, call: Prefixed) -> tuple[Tensor, Made]:
    """The output ``[B, S, H, D]``, and what the backward needs."""
    q, k, v, prefix_k, prefix_v, gate, mask, scale, causal = call
    own = Pass(scale, causal, mask)
    if P.runs_natively and own.is_native(q, k, v):
        out, numbers = one_pass.forward(*call)
        return out, Made(True, numbers, [])
    o1, l1 = P.attend(own, q, k, v)
    o2, l2 = P.attend(Pass(scale), q, of_batch(prefix_k, q), of_batch(prefix_v, q))
    if gate is None:
        out, total = P.merge(o1, l1, o2, l2)
        return out, Made(False, total, [])
    return P.add_gated(o1, o2, gate), Made(False, None, [o1, l1, o2, l2])


def trained(call: Prefixed) -> Grads:
    """All tensors but the mask."""
    return Grads(*call[:6])


def keep(call: Prefixed, out: Tensor, made: Made, needs: Grads) -> Kept:
    """What the backward needs."""
    results = made.parts if made.numbers is None else [out, made.numbers]
    return Kept(call, made.is_native, results)


def backward(P: Passes, kept: Kept, dout: Tensor, needs: Grads) -> Grads:
    """The gradients that are needed, by the formulas of this module."""
    call, results = kept.call, kept.results
    if kept.is_native:
        found = one_pass.backward(dout, *call, *results)
        return Grads(*(grad if need else None for grad, need in zip(found, needs, strict=True)))
    q, k, v, prefix_k, prefix_v, gate, mask, scale, causal = call
    dout = dout.contiguous()
    to_prefix, (o1, l1), (o2, l2), dgate = dout, results[:2], results[-2:], None
    if gate is not None:
        to_prefix, dgate = P.gate_grad(dout, o2, gate)
        # a query may see only the prefix, and exp(scores - l1) must not become NaN then
        l1 = l1.masked_fill(l1 == -torch.inf, 0.0)
    before = of_batch(prefix_k, q), of_batch(prefix_v, q)
    dq, dk, dv = Pass(scale, causal, mask).backward(dout, q, k, v, o1, l1)
    more, dprefix_k, dprefix_v = Pass(scale).backward(to_prefix, q, *before, o2, l2)
    return Grads(
        P.as_grad(dq.add_(more)) if needs.q else None,
        P.as_grad(dk) if needs.k else None,
        P.as_grad(dv) if needs.v else None,
        over_batch(dprefix_k, prefix_k) if needs.prefix_k else None,
        over_batch(dprefix_v, prefix_v) if needs.prefix_v else None,
        dgate if needs.gate else None,
    )


def like(call: Prefixed) -> tuple[Tensor, Made]:
    """Uninitialised results of ``forward``."""
    out, lse = _part_like(call.q)
    if call.gate is None:
        return out, Made(False, lse, [])
    return out, Made(False, None, [*_part_like(call.q), *_part_like(call.q)])


def like_grads(kept: Kept, dout: Tensor, needs: Grads) -> Grads:
    """Uninitialised results of ``backward``."""
    pairs = list(zip(kept.call[:6], needs, strict=True))
    of_positions = [_positions_first(t) if needed else None for t, needed in pairs[:3]]
    others = [t.new_empty(t.shape) if needed else None for t, needed in pairs[3:]]
    return Grads(*of_positions, *others)


def _part_like(q: Tensor) -> list[Tensor]:
    """The output and the log-sum-exp of a pass, uninitialised."""
    B, H, S, D = q.shape
    return [q.new_empty(B, S, H, D), q.new_empty(B, H, S, dtype=torch.float32)]


def _positions_first(t: Tensor) -> Tensor:
    """An uninitialised gradient of ``t [B, H, S, D]``, with the strides that ``as_grad`` gives it."""
    B, H, S, D = t.shape
    return t.new_empty(B, S, H, D).transpose(1, 2)


prefix_attention = Schedule(
    "prefix_attention",
    TorchPasses,
    TritonPasses,
    forward=forward,
    keep=keep,
    backward=backward,
    trained=trained,
    like=like,
    like_grads=like_grads,
    tuples=(Prefixed, Made, Kept, Grads),
)
