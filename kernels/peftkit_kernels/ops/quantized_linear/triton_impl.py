"""``nf4_linear`` and ``int8_linear`` by Triton kernels, as torch.library ops: traceable, and differentiable once.

With few rows one kernel decodes the weight in its loop. With many rows the weight is decoded into the workspace, then the
schedule of ``lora_linear`` runs. The backward decodes again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from peftkit_kernels.core import recompute
from peftkit_kernels.core.op import Differentiable, Op
from peftkit_kernels.low_rank import LoRA, adapter_dtype, cast, passes, rows
from peftkit_kernels.ops.lora_linear import triton_impl as dense
from peftkit_kernels.ops.lora_linear.torch_impl import unflatten
from peftkit_kernels.storage.quantized import QuantizedWeight, decode_triton, layout_of, rebuild


def forward(
    x: Tensor,
    q: Sequence[Tensor],
    layout: Sequence[int],
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scale: float,
    p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """``y``, ``[..., N]``, and ``s = drop(x) Aᵀ``, ``[M, R]`` (``[M, 0]`` without an adapter)."""
    if not x.numel():
        return _empty_outputs(x, q, layout, bias, A, B, scale, p, seed)
    flat, weight = rows(x), rebuild(q, layout)
    if A is None or B is None:
        y = dense.project(flat, weight, bias=bias)
        return unflatten(y, x.shape), flat.new_empty(flat.shape[0], 0)
    wide = adapter_dtype(x, A)
    s = passes.shrink(flat, cast(A, wide), p, seed)
    y = dense.project(flat, weight, s, cast(B, wide), scale, bias=bias)
    return unflatten(y, x.shape), s


def _empty_outputs(
    x: Tensor, q: Sequence[Tensor], layout: Sequence[int], bias: Any, A: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], layout[-2])
    M = x.shape[:-1].numel()
    if A is None:
        return y, x.new_empty(M, 0)
    return y, x.new_empty(M, A.shape[0], dtype=adapter_dtype(x, A))


def backward(
    dy: Tensor,
    q: Sequence[Tensor],
    layout: Sequence[int],
    x: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    s: Tensor | None,
    scale: float,
    p: float,
    seed: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Those of ``dx``, ``dA`` and ``dB`` that ``needs`` selects. dA needs ``x``, and dB needs ``s``."""
    if not dy.numel():
        return [
            grad.zero_() for grad in _like_grads(dy, q, layout, x, A, B, s, scale, p, seed, needs)
        ]
    # without dx the weight is not read, so an empty tensor of its width replaces it
    W = dy.new_empty(0, layout[-1])
    if needs[0]:
        W = decode_triton(rebuild(q, layout), dy.dtype)
    if A is None or B is None:
        return [unflatten(rows(dy) @ W, dy.shape)]
    return dense.backward(dy, W, x, A, B, s, scale, p, seed, needs)


def _like_grads(
    dy: Tensor,
    q: Sequence[Tensor],
    layout: Sequence[int],
    x: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    s: Tensor | None,
    scale: float,
    p: float,
    seed: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    like = dy.new_empty(*dy.shape[:-1], layout[-1]), A, B
    return [
        t.new_empty(t.shape)
        for t, needed in zip(like, needs, strict=True)
        if needed and t is not None
    ]


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, q, layout, _, A, B, *numbers = inputs
    ctx.recompute_x, x_parts = recompute.saved_for(x, A is not None and A.requires_grad)
    s = output[1] if B is not None and B.requires_grad else None
    ctx.save_for_backward(A, B, s, *q, *x_parts)
    ctx.layout, ctx.stored, ctx.numbers = layout, len(q), numbers


def _backward(ctx: Any, needs: Sequence[bool], dy: Tensor) -> tuple[Tensor | None, ...]:
    A, B, s, *more = ctx.saved_tensors
    q, x_parts = more[: ctx.stored], more[ctx.stored :]
    needs_x, needs_bias, needs_A, needs_B = needs
    dbias = rows(dy).sum(0) if needs_bias else None
    wanted = [needs_x, needs_A, needs_B]
    grads: Sequence[Tensor] = []
    if any(wanted):
        x = recompute.restore(ctx.recompute_x, x_parts)
        grads = _backward_op(dy, q, ctx.layout, x, A, B, s, *ctx.numbers, wanted)
    found = iter(grads)
    dx, dA, dB = (next(found) if needed else None for needed in wanted)
    return dx, dbias, dA, dB


_forward_op = Op(
    "quantized_linear",
    "(Tensor x, Tensor[] q, int[] layout, Tensor? bias, Tensor? A, Tensor? B, float scale, float p, int seed)"
    " -> (Tensor, Tensor)",
    forward,
    _empty_outputs,
)
quantized_linear_triton = Differentiable(_forward_op, ("x", "bias", "A", "B"), _keep, _backward)
_backward_op = Op(
    "quantized_linear_backward",
    "(Tensor dy, Tensor[] q, int[] layout, Tensor? x, Tensor? A, Tensor? B, Tensor? s, float scale, float p,"
    " int seed, bool[] needs) -> Tensor[]",
    backward,
    _like_grads,
)


def run_triton(x: Tensor, q: QuantizedWeight, bias: Tensor | None, lora: LoRA | None) -> Tensor:
    """``nf4_linear`` and ``int8_linear`` on Triton."""
    A, B, numbers = (
        (None, None, (0.0, 0.0, 0)) if lora is None else (lora.A, lora.B, lora.numbers())
    )
    return quantized_linear_triton(x, q.tensors(), layout_of(q), bias, A, B, *numbers)
