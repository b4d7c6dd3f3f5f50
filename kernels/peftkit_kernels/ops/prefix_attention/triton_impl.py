"""``prefix_attention`` as two flash passes of the library and Triton kernels that merge them, as torch.library ops.

The cache is read in place: neither keys nor heads are copied.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core.launch import cdiv, launch
from peftkit_kernels.core.op import Differentiable, Op
from peftkit_kernels.low_rank import cast
from peftkit_kernels.ops.prefix_attention.config import MergeConfig
from peftkit_kernels.ops.prefix_attention.flash import Pass, of_batch, over_batch


@functools.cache
def _kernels() -> Any:
    from peftkit_kernels.ops.prefix_attention import kernels

    return kernels


def merge(
    o1: Tensor, l1: Tensor, o2: Tensor, l2: Tensor, *, config: MergeConfig | None = None
) -> tuple[Tensor, Tensor]:
    """The output ``[B, S, H, D]`` and the log-sum-exp ``[B, H, S]`` over all keys, from those of the two parts."""
    o1, l1, o2, l2 = (t.contiguous() for t in (o1, l1, o2, l2))
    out, total = torch.empty_like(o1), torch.empty_like(l1)
    _launch(_kernels().merge_kernel, o1, config, o1, o2, l1, l2, None, out, total, HAS_GATE=False)
    return out, total


def add_gated(o1: Tensor, o2: Tensor, gate: Tensor, *, config: MergeConfig | None = None) -> Tensor:
    """``o1 + gate · o2``, ``[B, S, H, D]``, for ``gate [H]``."""
    o1, o2 = o1.contiguous(), o2.contiguous()
    out, none = torch.empty_like(o1), None
    _launch(
        *(_kernels().merge_kernel, o1, config, o1, o2, none, none, gate, out, none), HAS_GATE=True
    )
    return out


def gate_grad(
    dout: Tensor, o2: Tensor, gate: Tensor, *, config: MergeConfig | None = None
) -> tuple[Tensor, Tensor]:
    """``gate · dout``, ``[B, S, H, D]``, and ``dgate = Σ dout ∘ o2``, ``[H]``, in one pass; partial sums are added in a fixed order."""
    B, S, H, D = dout.shape
    c = config or MergeConfig.choose(D)
    dout, o2 = dout.contiguous(), o2.contiguous()
    do2 = torch.empty_like(dout)
    partial = dout.new_empty(cdiv(S, c.block_s), B, H, dtype=torch.float32)
    _launch(_kernels().gate_grad_kernel, dout, c, dout, o2, gate, do2, partial)
    return do2, cast(partial.sum((0, 1)), gate.dtype)


def _launch(
    kernel: Any, like: Tensor, config: MergeConfig | None, *tensors: Tensor | None, **flags: bool
) -> None:
    """Launch one program for every head and block of positions of ``like [B, S, H, D]``."""
    B, S, H, D = like.shape
    c = config or MergeConfig.choose(D)
    launch(
        kernel,
        (B * H, cdiv(S, c.block_s)),
        *(*tensors, S, H, D),
        **flags,
        BLOCK_S=c.block_s,
        BLOCK_D=c.block_d,
        num_warps=4,
        num_stages=1,
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    gate: Tensor | None,
    mask: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The output ``[B, S, H, D]``, and the other tensors for backward.

    They are the log-sum-exp of the output or, with a gate, both parts and their log-sum-exps.
    """
    o1, l1 = Pass(scale, causal, mask).forward(q, k, v)
    o2, l2 = Pass(scale).forward(q, of_batch(prefix_k, q), of_batch(prefix_v, q))
    if gate is None:
        out, total = merge(o1, l1, o2, l2)
        return out, [total]
    parts = [t.contiguous() for t in (o1, l1, o2, l2)]
    return add_gated(parts[0], parts[2], gate), parts


def _like_outputs(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, list[Tensor]]:
    B, H, S, D = q.shape
    gate = rest[2]

    def part() -> list[Tensor]:
        return [q.new_empty(B, S, H, D), q.new_empty(B, H, S, dtype=torch.float32)]

    out, lse = part()
    return out, [lse] if gate is None else [*part(), *part()]


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    gate: Tensor | None,
    mask: Tensor | None,
    kept: Sequence[Tensor],
    scale: float,
    causal: bool,
) -> list[Tensor]:
    """The gradients of the first five arguments after ``dout``, and of the gate if there is one.

    Each pass gets the output and log-sum-exp over all keys or, with a gate, its own.
    """
    dout = dout.contiguous()
    do2, (o1, l1), (o2, l2), dgate = dout, kept[:2], kept[-2:], None
    if gate is not None:
        do2, dgate = gate_grad(dout, o2, gate)
        # a query may see only the prefix, and exp(scores - l1) must not become NaN then
        l1 = l1.masked_fill(l1 == -torch.inf, 0.0)
    before = of_batch(prefix_k, q), of_batch(prefix_v, q)
    dq, dk, dv = Pass(scale, causal, mask).backward(dout, q, k, v, o1, l1)
    more, dprefix_k, dprefix_v = Pass(scale).backward(do2, q, *before, o2, l2)
    grads = [_positions_first(t) for t in (dq.add_(more), dk, dv)]
    grads += [over_batch(dprefix_k, prefix_k), over_batch(dprefix_v, prefix_v)]
    return grads if dgate is None else [*grads, dgate]


def _positions_first(t: Tensor) -> Tensor:
    """``t [B, H, S, D]`` with the strides of a contiguous ``[B, S, H, D]``, which the fake tensors have and most flash passes return."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _like_grads(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    gate: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    def like(t: Tensor) -> Tensor:
        B, H, S, D = t.shape
        return t.new_empty(B, S, H, D).transpose(1, 2)

    grads = [like(t) for t in (q, k, v)]
    return grads + [t.new_empty(t.shape) for t in (prefix_k, prefix_v, gate) if t is not None]


_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? gate, Tensor? mask"
)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, list[Tensor]]) -> None:
    *tensors, ctx.scale, ctx.causal = inputs
    out, kept = output
    ctx.save_for_backward(*tensors, *([out] if tensors[5] is None else []), *kept)


def _backward(ctx: Any, needs: Sequence[bool], dout: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    tensors, kept = saved[:7], list(saved[7:])
    grads = _backward_op(dout, *tensors, kept, ctx.scale, ctx.causal)
    pairs = zip([*grads, None][:6], needs, strict=True)
    return tuple(grad if needed else None for grad, needed in pairs)


_forward_op = Op(
    "prefix_attention",
    f"({_TENSORS}, float scale, bool causal) -> (Tensor, Tensor[])",
    forward,
    _like_outputs,
)
_op = Differentiable(_forward_op, ("q", "k", "v", "prefix_k", "prefix_v", "gate"), _keep, _backward)
_backward_op = Op(
    "prefix_attention_backward",
    f"(Tensor dout, {_TENSORS}, Tensor[] kept, float scale, bool causal) -> Tensor[]",
    backward,
    _like_grads,
)


def prefix_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    gate: Tensor | None,
    mask: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    """As ``PrefixAttention``; arguments as ``prefix_attention``."""
    return _op(q, k, v, prefix_k, prefix_v, gate, mask, scale, causal)
