"""``lora_decoder_layer`` by the kernels of its parts, as one schedule each way: one autograd function, one launch plan.

The norms' kernels add the residuals of the first half and of the backward, in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkit_kernels.core.op import Differentiable, Op
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.low_rank.groups import group
from peftkit_kernels.ops.attention import causal
from peftkit_kernels.ops.frozen_norm import triton_impl as norm
from peftkit_kernels.ops.lora_decoder_layer.passes import HeadNorms, rotate, rotate_back_
from peftkit_kernels.ops.lora_decoder_layer.reference import Norm
from peftkit_kernels.ops.lora_qkv import triton_impl as qkv
from peftkit_kernels.ops.lora_swiglu_mlp import triton_impl as mlp
from peftkit_kernels.storage.quantized import Weight, arguments_of, weights_of

QKV, OUT, MLP = range(0, 3), range(3, 4), range(4, 7)
"""The linears of each part: q, k, v; the output projection; gate, up, down."""
PARTS = QKV, OUT, MLP


def _head_norms(
    norms: Sequence[Tensor],
    eps: Sequence[float],
    offsets: Sequence[float],
    round_first: Sequence[bool],
) -> HeadNorms | None:
    """Those of the norms that follow the layer's own two, if there are any."""
    return HeadNorms(*norms[2:], eps[2], offsets[2], round_first[2]) if norms[2:] else None


class Adapters(NamedTuple):
    """Biases and adapters in the form of ``lora_qkv``: without gaps, with the numbers of their linears."""

    biases: Sequence[Tensor]
    As: Sequence[Tensor]
    Bs: Sequence[Tensor]
    biased: Sequence[int]
    adapted: Sequence[int]
    scales: Sequence[float]
    ps: Sequence[float]
    seeds: Sequence[int]

    def of(self, part: range) -> Adapters:
        """Those of one part of the layer, whose linears are numbered from 0."""
        biases = [i for i, linear in enumerate(self.biased) if linear in part]
        here = [i for i, linear in enumerate(self.adapted) if linear in part]
        return Adapters(
            [self.biases[i] for i in biases],
            [self.As[i] for i in here],
            [self.Bs[i] for i in here],
            [self.biased[i] - part.start for i in biases],
            [self.adapted[i] - part.start for i in here],
            [self.scales[i] for i in here],
            [self.ps[i] for i in here],
            [self.seeds[i] for i in here],
        )

    @property
    def numbers(self) -> tuple[Sequence[Any], ...]:
        """What the backward of a part needs besides the factors."""
        return self.adapted, self.scales, self.ps, self.seeds

    def loras(self, count: int) -> list[LoRA | None]:
        """The adapters of ``count`` linears."""
        return qkv.loras_of(count, self.As, self.Bs, *self.numbers)


def forward(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: Sequence[Tensor],
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
    eps: Sequence[float],
    offsets: Sequence[float],
    round_first: Sequence[bool],
    act: str,
    scale: float,
    kernel: str,
    remake: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """``[y, k, v]``, and what backward needs besides the arguments, in the order of ``_Kept``."""
    adapters = Adapters(biases, As, Bs, biased, adapted, scales, ps, seeds)
    first, out, inner = (adapters.of(part) for part in PARTS)
    W_qkv, W_out, W_mlp = _weights(weights, storage)
    h, rstd = norm.rms_forward(x, norms[0], eps[0], offsets[0], round_first[0])
    (raw_q, raw_k, v), s_qkv = qkv.forward(h, *W_qkv, *first)
    head_norms = _head_norms(norms, eps, offsets, round_first)
    q, k = rotate(raw_q, raw_k, cos, sin, head_norms)
    q, k, v = (_heads(t, cos.shape[2]) for t in (q, k, v))
    o, numbers = causal.forward(q, k, v, scale, kernel)
    (x2,), s_out = qkv.forward(o.flatten(2), *W_out, *out)
    h, rstd2 = norm.rms_forward_of_sum(x2, x, norms[1], eps[1], offsets[1], round_first[1])
    y, gate_up, s_mlp = mlp.forward(h, *W_mlp, *inner, act, remade=REMADE[remake])
    y.add_(x2)
    # a norm's gradient needs its input, from which the rotated queries and keys are made again
    own_q = [q] if head_norms is None else [raw_q, raw_k]
    own_q, own_gate_up = [] if remake == "most" else own_q, [] if gate_up is None else [gate_up]
    kept = _Kept(rstd, own_q, o, numbers, s_qkv, x2, s_out, rstd2, own_gate_up, s_mlp)
    return [y, k, v], kept.flat()


REMADE = {"": 0, "gate": 1, "most": 2}
"""What the backward computes again: nothing; the gate; gate and up, and q, k and v. With how many of gate and up that is."""


def _weights(
    weights: Sequence[Tensor], storage: Sequence[int]
) -> list[tuple[list[Tensor], list[int]]]:
    """The weights of each part, in the form of its op."""
    linears = weights_of(weights, storage)
    return [arguments_of(linears[part.start : part.stop]) for part in PARTS]


class _Kept(NamedTuple):
    """What a forward keeps for its backward besides its arguments and results."""

    rstd: Tensor
    q: list[Tensor]
    o: Tensor
    numbers: list[Tensor]
    s_qkv: list[Tensor]
    x2: Tensor
    s_out: list[Tensor]
    rstd2: Tensor
    gate_up: list[Tensor]
    s_mlp: list[Tensor]

    def flat(self) -> list[Tensor]:
        """All tensors."""
        return [t for part in self for t in (part if isinstance(part, list) else [part])]

    @classmethod
    def of(
        cls, flat: Sequence[Tensor], adapters: Adapters, kernel: str, remake: str, normed: bool
    ) -> _Kept:
        """The tensors by name, from those of ``flat``."""
        left = iter(flat)
        first, out, inner = (adapters.of(part).loras(len(part)) for part in PARTS)
        groups = [len(group(loras)) for loras in (first, out, inner[: mlp.DOWN])]

        def take(count: int) -> list[Tensor]:
            return [next(left) for _ in range(count)]

        keeps_most = remake != "most"
        return cls(
            next(left),
            take((1 + normed) * keeps_most),
            next(left),
            take(3 if kernel == "cudnn" else 1),
            take(groups[0]),
            next(left),
            take(groups[1]),
            next(left),
            take(keeps_most),
            take(groups[2] + (inner[mlp.DOWN] is not None)),
        )


def _heads(t: Tensor, head_size: int) -> Tensor:
    """``[B, S, H D]`` as ``[B, H, S, D]``."""
    return t.view(*t.shape[:2], -1, head_size).transpose(1, 2)


def _empty_outputs(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: Sequence[Tensor],
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
    *rest: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    (B, S, _D), D, remake = x.shape, cos.shape[2], rest[-1]
    adapters = Adapters(biases, As, Bs, biased, adapted, scales, ps, seeds)
    first, out, inner = (adapters.of(part).loras(len(part)) for part in PARTS)
    M, rstd = B * S, x.new_empty(B * S, dtype=torch.float32)
    widths = [weight.shape[0] for weight in weights_of(weights, storage)]
    heads = [width // D for width in widths[:3]]
    q, k, v = (x.new_empty(B, S, n, D).transpose(1, 2) for n in heads)
    own_q = [q]
    if norms[2:]:
        own_q = [x.new_empty(B, S, widths[0]), x.new_empty(B, S, widths[1])]
    kept = _Kept(
        *(rstd, [] if remake == "most" else own_q, x.new_empty(B, S, heads[0], D)),
        [x.new_empty(B, heads[0], S, dtype=torch.float32)],
        qkv.joint_like(x, M, first),
        x.new_empty(x.shape),
        qkv.joint_like(x, M, out),
        torch.empty_like(rstd),
        [] if remake == "most" else [x.new_empty(M, (2 - REMADE[remake]) * widths[4])],
        qkv.joint_like(x, M, inner[: mlp.DOWN]) + qkv.joint_like(x, M, inner[mlp.DOWN :]),
    )
    return [x.new_empty(x.shape), k, v], kept.flat()


def backward(
    dy: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    kept: Sequence[Tensor],
    norms: Sequence[Tensor],
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
    eps: Sequence[float],
    offsets: Sequence[float],
    round_first: Sequence[bool],
    act: str,
    scale: float,
    kernel: str,
    remake: str,
    needs_x: bool,
    needs_A: Sequence[bool],
    needs_B: Sequence[bool],
) -> list[Tensor]:
    """``dx`` if needed, the needed dA's, and the needed dB's, in this order.

    ``dy``, ``dk`` and ``dv`` are the gradients of the three results; ``kept`` is what the forward has kept; the other arguments
    are those of the forward. ``k`` or ``v`` is ``None`` if it is made again.
    """
    adapters = Adapters(biases, As, Bs, biased, adapted, scales, ps, seeds)
    first, out, inner = (adapters.of(part) for part in PARTS)
    needs = [_needs(part, adapted, needs_A, needs_B) for part in PARTS]
    head_norms = _head_norms(norms, eps, offsets, round_first)
    saved = _Kept.of(kept, adapters, kernel, remake, head_norms is not None)
    W_qkv, W_out, W_mlp = _weights(weights, storage)
    dy = torch.zeros_like(x) if dy is None else dy
    # 1. the MLP, its norm and the second residual sum
    h = norm.rms_forward(saved.x2, norms[1], eps[1], offsets[1], round_first[1])[0]
    gate_up: Any = saved.gate_up[0] if saved.gate_up else None
    if remake:
        loras = inner.loras(len(MLP))
        gate_up = mlp.remake(h, *W_mlp, inner.biases, inner.biased, loras, saved.s_mlp, gate_up)
    dh, *mlp_grads = mlp.backward(
        *(dy, *W_mlp, h, gate_up, inner.As, inner.Bs, saved.s_mlp),
        *(*inner.numbers, act, True, [False, False], *needs[2]),
    )
    del gate_up
    numbers = saved.rstd2, offsets[1]
    dx2 = norm.backward(dh, saved.x2, norms[1], None, *numbers, residual=dy)
    # 2. the output projection and attention
    do, *out_grads = qkv.backward(
        *([dx2], *W_out, saved.o.flatten(2), out.As, out.Bs, saved.s_out),
        *(*out.numbers, True, *needs[1]),
    )
    h = norm.rms_forward(x, norms[0], eps[0], offsets[0], round_first[0])[0]
    q, raw = saved.q[0] if saved.q else None, saved.q
    if not saved.q:
        loras = first.loras(len(QKV))
        *raw, v = qkv.outputs(h, *W_qkv, first.biases, first.biased, loras, saved.s_qkv)
        v = _heads(v, cos.shape[2])
    if k is None:
        q, k = (_heads(t, cos.shape[2]) for t in rotate(*raw, cos, sin, head_norms))
    grads = causal.backward(do.view(saved.o.shape), q, k, v, saved.o, saved.numbers, scale, kernel)
    dqkv = [t.transpose(1, 2).flatten(2) for t in grads]
    for total, more in zip(dqkv[1:], (dk, dv), strict=True):
        if more is not None:
            total.add_(more.transpose(1, 2).flatten(2))
    of_norms = () if head_norms is None else (*raw, head_norms)
    rotate_back_(dqkv[0], dqkv[1], cos, sin, *of_norms)
    # 3. q, k and v, their norm and the first residual sum
    found = qkv.backward(
        *(dqkv, *W_qkv, h, first.As, first.Bs, saved.s_qkv),
        *(*first.numbers, needs_x, *needs[0]),
    )
    results = []
    if needs_x:
        dh = found.pop(0)
        numbers = saved.rstd, offsets[0]
        results = [norm.backward(dh, x, norms[0], None, *numbers, residual=dx2)]
    by_part = zip((found, out_grads, mlp_grads), needs, strict=True)
    cut = [(grads[: sum(part_A)], grads[sum(part_A) :]) for grads, (part_A, _) in by_part]
    return (
        results
        + [dA for grads, _ in cut for dA in grads]
        + [dB for _, grads in cut for dB in grads]
    )


def _needs(
    part: range, adapted: Sequence[int], needs_A: Sequence[bool], needs_B: Sequence[bool]
) -> tuple[list[bool], list[bool]]:
    """Which dA and dB are needed of the adapters of one part."""
    here = [i for i, linear in enumerate(adapted) if linear in part]
    return [needs_A[i] for i in here], [needs_B[i] for i in here]


def _like_grads(
    dy: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    kept: Sequence[Tensor],
    norms: Sequence[Tensor],
    weights: Sequence[Tensor],
    storage: Sequence[int],
    biases: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    *rest: Any,
) -> list[Tensor]:
    *_, needs_x, needs_A, needs_B = rest
    grads = [x.new_empty(x.shape)] if needs_x else []
    factors = zip((*As, *Bs), (*needs_A, *needs_B), strict=True)
    return grads + [t.new_empty(t.shape) for t, needed in factors if needed]


def _keep(ctx: Any, inputs: tuple, output: tuple[list[Tensor], list[Tensor]]) -> None:
    x, cos, sin, norms, weights, ctx.storage, biases, As, Bs, *ctx.numbers = inputs
    (_, k, v), kept = output
    remake = ctx.numbers[-1]
    if remake == "most" or norms[2:]:
        k = None
    if remake == "most":
        v = None
    # only what is made again needs biases
    biases = biases if remake else []
    ctx.save_for_backward(x, cos, sin, k, v, *norms, *weights, *biases, *As, *Bs, *kept)
    ctx.counts = 5, len(norms), len(weights), len(biases), len(As), len(Bs)


def _backward(ctx: Any, needs: Sequence[Any], grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    *_, count = ctx.counts
    first, norms, weights, biases, As, Bs, kept = qkv.split(ctx.saved_tensors, *ctx.counts)
    biased, *numbers = ctx.numbers
    needs_x, needs_A, needs_B = needs
    dx, dA, dB = None, [None] * count, [None] * count
    if (needs_x or any((*needs_A, *needs_B))) and any(grad is not None for grad in grads):
        tensors = *first, kept, norms, weights, ctx.storage, biases, As, Bs
        wanted = needs_x, list(needs_A), list(needs_B)
        biased = biased if biases else []
        found = iter(_backward_op(*grads, *tensors, biased, *numbers, *wanted))
        dx = next(found) if needs_x else None
        dA, dB = qkv.factors_of(found, needs_A, needs_B)
    return dx, dA, dB


_NUMBERS = (
    "int[] biased, int[] adapted, float[] scales, float[] ps, int[] seeds, float[] eps, float[] offsets,"
    " bool[] round_first, str act, float scale, str kernel, str remake"
)

_forward_op = Op(
    "lora_decoder_layer",
    "(Tensor x, Tensor cos, Tensor sin, Tensor[] norms, Tensor[] weights, int[] storage, Tensor[] biases,"
    f" Tensor[] As, Tensor[] Bs, {_NUMBERS}) -> (Tensor[], Tensor[])",
    forward,
    _empty_outputs,
    looks_at_storage=("weights",),
)
lora_decoder_layer_triton = Differentiable(_forward_op, ("x", "As", "Bs"), _keep, _backward)
_backward_op = Op(
    "lora_decoder_layer_backward",
    "(Tensor? dy, Tensor? dk, Tensor? dv, Tensor x, Tensor cos, Tensor sin, Tensor? k, Tensor? v, Tensor[] kept,"
    f" Tensor[] norms, Tensor[] weights, int[] storage, Tensor[] biases, Tensor[] As, Tensor[] Bs, {_NUMBERS},"
    " bool needs_x, bool[] needs_A, bool[] needs_B) -> Tensor[]",
    backward,
    _like_grads,
    looks_at_storage=("weights",),
)


def op_arguments(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: Sequence[Norm],
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    loras: Sequence[LoRA | None],
    act: str,
    scale: float,
    kernel: str,
    remake: str,
) -> tuple[Any, ...]:
    """The arguments of the op, from those of ``lora_decoder_layer``."""
    return (
        *(x, cos, sin, [norm.weight for norm in norms], *arguments_of(weights)),
        *qkv.without_gaps(biases, loras),
        [norm.eps for norm in norms],
        [norm.offset for norm in norms],
        [norm.round_first for norm in norms],
        *(act, scale, kernel, remake),
    )
