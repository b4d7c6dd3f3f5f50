"""A decoder layer of the Llama kind by the kernels of its parts: the schedule of ``lora_decoder_layer`` on Triton.

One schedule each way is one autograd function and one launch plan. The norms' kernels add the residuals of the first half and of the
backward, in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftkit_kernels.core.schedule import Schedule
from peftkit_kernels.ops.attention import causal
from peftkit_kernels.ops.frozen_norm import passes as norm
from peftkit_kernels.ops.lora_decoder_layer.passes import HeadNorms, rotate, rotate_back_
from peftkit_kernels.ops.lora_decoder_layer.reference import Norm
from peftkit_kernels.ops.lora_linear import schedule as linear
from peftkit_kernels.ops.lora_linear.schedule import Grads, Linear, Linears
from peftkit_kernels.ops.lora_linear.triton_passes import joint_like
from peftkit_kernels.ops.lora_swiglu_mlp import schedule as mlp
from peftkit_kernels.ops.lora_swiglu_mlp.triton_passes import TritonPasses
from peftkit_kernels.storage.quantized import Weight

QKV, OUT, MLP = slice(0, 3), slice(3, 4), slice(4, 7)
"""The linears of each part: q, k, v; the output projection; gate, up, down."""
REMADE = {"": 0, "gate": 1, "most": 2}
"""What the backward computes again: nothing; the gate; gate and up, and q, k and v. With how many of gate and up that is."""


class Layer(NamedTuple):
    """The arguments, as ``lora_decoder_layer`` describes them; ``kernel`` is that of attention."""

    x: Tensor
    cos: Tensor
    sin: Tensor
    norms: list[Norm]
    linears: list[Linear]
    act: str
    scale: float
    kernel: str
    remake: str


class Made(NamedTuple):
    """What the forward makes for the backward.

    Attributes:
        rstd: That of the first norm.
        q: The rotated queries; or queries and keys before their norms, from which the rotated ones are made again; or nothing.
        o: Attention's output, ``[B, S, heads, head size]``.
        numbers: What attention keeps besides.
        s_qkv: ``drop(x) Aᵀ`` of each group of adapters of q, k and v.
        x2: The sum between the halves.
        s_out: As ``s_qkv``, of the output projection.
        rstd2: That of the second norm.
        mlp: What the MLP makes.
    """

    rstd: Tensor
    q: list[Tensor]
    o: Tensor
    numbers: list[Tensor]
    s_qkv: list[Tensor]
    x2: Tensor
    s_out: list[Tensor]
    rstd2: Tensor
    mlp: mlp.Made


class Kept(NamedTuple):
    """What the backward needs. ``k`` or ``v`` is ``None`` if it is made again."""

    call: Layer
    k: Tensor | None
    v: Tensor | None
    made: Made


def forward(P: TritonPasses, call: Layer) -> tuple[tuple[Tensor, Tensor, Tensor], Made]:
    """The output, and the rotated keys and the values; and what the backward needs."""
    x, norms, linears, head_size = call.x, call.norms, call.linears, call.cos.shape[2]
    # 1. attention
    h, rstd = norm.rms_forward(x, *norms[0])
    (raw_q, raw_k, v), s_qkv = linear.forward(P, Linears(h, linears[QKV]))
    q, k = rotate(raw_q, raw_k, call.cos, call.sin, _head_norms(norms))
    q, k, v = (_heads(t, head_size) for t in (q, k, v))
    o, numbers = causal.forward(q, k, v, call.scale, call.kernel)
    (x2,), s_out = linear.forward(P, Linears(o.flatten(2), linears[OUT]))
    # 2. the first residual sum, and the MLP
    h, rstd2 = norm.rms_forward_of_sum(x2, x, *norms[1])
    inner = mlp.MLP(h, linears[MLP], call.act)
    y, of_mlp = mlp.forward(P, inner, remade=REMADE[call.remake])
    y.add_(x2)
    # a norm's gradient needs its input, from which the rotated queries and keys are made again
    own_q = [q] if not norms[2:] else [raw_q, raw_k]
    own_q = [] if call.remake == "most" else own_q
    return (y, k, v), Made(rstd, own_q, o, numbers, s_qkv, x2, s_out, rstd2, of_mlp)


def trained(call: Layer) -> Grads:
    """The input and the factors."""
    found = linear.trained(Linears(call.x, call.linears))
    return found._replace(bias=[None] * len(call.linears))


def keep(call: Layer, result: tuple[Tensor, Tensor, Tensor], made: Made, needs: Grads) -> Kept:
    """What the backward needs."""
    _, k, v = result
    if not call.remake:
        # only what is made again needs biases
        call = call._replace(linears=[part._replace(bias=None) for part in call.linears])
    remakes_most = call.remake == "most"
    return Kept(
        call, None if remakes_most or call.norms[2:] else k, None if remakes_most else v, made
    )


def backward(P: TritonPasses, kept: Kept, grads: Sequence[Tensor | None], needs: Grads) -> Grads:
    """The gradients that are needed, from those of the three results."""
    call, k, v, made = kept
    x, norms, linears, head_size = call.x, call.norms, call.linears, call.cos.shape[2]
    dy, dk, dv = grads
    dy = torch.zeros_like(x) if dy is None else dy
    # 1. the MLP, its norm and the second residual sum
    h = norm.rms_forward(made.x2, *norms[1])[0]
    gate_up = made.mlp.gate_up
    if call.remake:
        gate_up = mlp.remake(P, mlp.MLP(h, linears[MLP], call.act), made.mlp)
    of_mlp = mlp.Kept(h, linears[MLP], call.act, gate_up, made.mlp.s, made.mlp.s_down)
    mlp_grads = mlp.backward(P, of_mlp, dy, _of(needs, MLP, needs_x=True))
    del gate_up, of_mlp
    numbers = None, made.rstd2, norms[1].offset
    dx2 = norm.backward(mlp_grads.x, made.x2, norms[1].weight, *numbers, residual=dy)
    # 2. the output projection and attention
    of_out = _kept(made.o.flatten(2), linears[OUT], made.s_out)
    out_grads = linear.backward(P, of_out, [dx2], _of(needs, OUT, needs_x=True))
    h = norm.rms_forward(x, *norms[0])[0]
    q, raw = made.q[0] if made.q else None, made.q
    if not made.q:
        *raw, v = linear.outputs(P, Linears(h, linears[QKV]), made.s_qkv)
        v = _heads(v, head_size)
    head_norms = _head_norms(norms)
    if k is None:
        rotated = rotate(*raw, call.cos, call.sin, head_norms)
        q, k = (_heads(t, head_size) for t in rotated)
    do = out_grads.x.view(made.o.shape)
    own = causal.backward(do, q, k, v, made.o, made.numbers, call.scale, call.kernel)  # pyright: ignore[reportArgumentType]
    dqkv = [t.transpose(1, 2).flatten(2) for t in own]
    for total, more in zip(dqkv[1:], (dk, dv), strict=True):
        if more is not None:
            total.add_(more.transpose(1, 2).flatten(2))
    of_norms = () if head_norms is None else (*raw, head_norms)
    rotate_back_(dqkv[0], dqkv[1], call.cos, call.sin, *of_norms)
    # 3. q, k and v, their norm and the first residual sum
    of_qkv = _kept(h, linears[QKV], made.s_qkv)
    qkv_grads = linear.backward(P, of_qkv, dqkv, _of(needs, QKV, needs_x=needs.x))
    dx = None
    if needs.x:
        numbers = None, made.rstd, norms[0].offset
        dx = norm.backward(qkv_grads.x, x, norms[0].weight, *numbers, residual=dx2)
    parts = qkv_grads, out_grads, mlp_grads
    return Grads(
        dx,
        [None] * len(linears),
        [dA for part in parts for dA in part.A],
        [dB for part in parts for dB in part.B],
    )


def buffers(part: Layer | Kept) -> Sequence[Weight]:
    """The weights, as in the schedules of the parts."""
    linears = part.call.linears if isinstance(part, Kept) else part.linears
    return [linear.weight for linear in linears]


def like(call: Layer) -> tuple[tuple[Tensor, Tensor, Tensor], Made]:
    """Uninitialised results of ``forward``."""
    x, (B, S, _), D = call.x, call.x.shape, call.cos.shape[2]
    M = B * S
    loras = [part.lora for part in call.linears]
    widths = [part.weight.shape[0] for part in call.linears]
    heads = [width // D for width in widths[QKV]]
    q, k, v = (x.new_empty(B, S, count, D).transpose(1, 2) for count in heads)
    own_q = [q]
    if call.norms[2:]:
        own_q = [x.new_empty(B, S, width) for width in widths[:2]]
    _, of_mlp = mlp.like(mlp.MLP(x, call.linears[MLP], call.act))
    gate_up = [x.new_empty(M, widths[4])] if call.remake == "gate" else of_mlp.gate_up
    made = Made(
        x.new_empty(M, dtype=torch.float32),
        [] if call.remake == "most" else own_q,
        x.new_empty(B, S, heads[0], D),
        [x.new_empty(B, heads[0], S, dtype=torch.float32)],
        joint_like(x, M, loras[QKV]),
        x.new_empty(x.shape),
        joint_like(x, M, loras[OUT]),
        x.new_empty(M, dtype=torch.float32),
        of_mlp._replace(gate_up=None if call.remake == "most" else gate_up),
    )
    return (x.new_empty(x.shape), k, v), made


def like_grads(kept: Kept, grads: Sequence[Tensor | None], needs: Grads) -> Grads:
    """Uninitialised results of ``backward``."""
    x, linears = kept.call.x, kept.call.linears
    own = linear.like_grads(_kept(x, linears, None), [x] * len(linears), needs._replace(x=False))
    return own._replace(x=x.new_empty(x.shape) if needs.x else None)


def _head_norms(norms: Sequence[Norm]) -> HeadNorms | None:
    """Those that follow the layer's own two, if there are any."""
    return HeadNorms(norms[2].weight, *norms[3]) if norms[2:] else None


def _heads(t: Tensor, head_size: int) -> Tensor:
    """``[B, S, H D]`` as ``[B, H, S, D]``."""
    return t.view(*t.shape[:2], -1, head_size).transpose(1, 2)


def _kept(x: Tensor, linears: Sequence[Linear], s: list[Tensor] | None) -> linear.Kept:
    """What the backward of some linears needs."""
    return linear.Kept(x, [part.weight for part in linears], [part.lora for part in linears], s)


def _of(needs: Grads, part: slice, *, needs_x: bool) -> Grads:
    """The needs of one part of the layer."""
    return Grads(needs_x, needs.bias[part], needs.A[part], needs.B[part])


lora_decoder_layer = Schedule(
    "lora_decoder_layer",
    None,
    TritonPasses,
    forward=forward,
    keep=keep,
    backward=backward,
    trained=trained,
    like=like,
    like_grads=like_grads,
    tuples=(Norm, Layer, Made, Kept),
    outputs=lambda call: 3,
    buffers=buffers,
)
