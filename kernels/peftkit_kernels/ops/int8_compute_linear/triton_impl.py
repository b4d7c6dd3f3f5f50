"""``int8_compute_linear`` by Triton kernels, as torch.library ops: traceable, and differentiable once.

Each direction has two kernels: one quantises the rows and computes their low-rank product, one multiplies the codes and adds the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from peftkit_kernels.core import recompute
from peftkit_kernels.core.op import Differentiable, Op
from peftkit_kernels.low_rank import LoRA, adapter_dtype, cast, passes, rows
from peftkit_kernels.ops.lora_linear.torch_impl import unflatten
from peftkit_kernels.storage.int8 import Int8Weight
from peftkit_kernels.storage.int8.product.passes import outliers_of, product, quantize


def forward(
    x: Tensor,
    codes: Tensor,
    row_absmax: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scale: float,
    p: float,
    seed: int,
    outlier: float | None,
) -> tuple[Tensor, Tensor]:
    """``y``, ``[..., N]``, and ``s = drop(x) Aᵀ``, ``[M, R]`` (``[M, 0]`` without an adapter)."""
    if not x.numel():
        return _empty_outputs(x, codes, row_absmax, bias, A)
    flat, dtype, q = rows(x), x.dtype, Int8Weight(codes, row_absmax)
    wide_A, wide_B = (None if t is None else cast(t, adapter_dtype(x, t)) for t in (A, B))
    bias = None if bias is None else cast(bias, dtype)
    found = None if outlier is None else outliers_of(flat, outlier)
    x8, step, s = quantize(flat, wide_A, p=p, seed=seed, skip=None if found is None else found.skip)
    scales = step, q.row_scale()
    y = product(x8, codes, *scales, s, wide_B, scale, dtype, bias=bias, outliers=found)
    return unflatten(y, x.shape), flat.new_empty(flat.shape[0], 0) if s is None else s


def _empty_outputs(
    x: Tensor, codes: Tensor, row_absmax: Tensor, bias: Any, A: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], codes.shape[0])
    M = x.shape[:-1].numel()
    if A is None:
        return y, x.new_empty(M, 0)
    return y, x.new_empty(M, A.shape[0], dtype=adapter_dtype(x, A))


def backward(
    dy: Tensor,
    codes: Tensor,
    row_absmax: Tensor,
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
        grads = _like_grads(dy, codes, row_absmax, x, A, B, s, scale, p, seed, needs)
        return [grad.zero_() for grad in grads]
    needs_x, needs_A, needs_B = needs
    flat, dtype = rows(dy), dy.dtype
    wide_A, wide_B = (None if t is None else cast(t, adapter_dtype(dy, t)) for t in (A, B))
    dx = dA = dB = ds = None
    if needs_B and B is not None:
        dB = passes.grad_b(flat, s, scale, B.dtype)
    if needs_x:
        steps = Int8Weight(codes, row_absmax).row_scale()
        factor = None if wide_B is None else wide_B.t()
        g8, step, ds = quantize(flat, factor, scale=scale, column_scale=steps)
        update = None if wide_A is None else wide_A.t()
        dx = product(g8, codes.t(), step, None, ds, update, 1.0, dtype, p=p, seed=seed)
        dx = unflatten(dx, dy.shape)
    elif needs_A:
        ds = passes.grad_s(flat, wide_B, scale)
    if needs_A and A is not None:
        dA = passes.grad_a(ds, rows(x), A.dtype, p, seed)
    return [grad for grad in (dx, dA, dB) if grad is not None]


def _like_grads(
    dy: Tensor,
    codes: Tensor,
    row_absmax: Tensor,
    x: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    s: Tensor | None,
    scale: float,
    p: float,
    seed: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    like = dy.new_empty(*dy.shape[:-1], codes.shape[1]), A, B
    return [
        t.new_empty(t.shape)
        for t, needed in zip(like, needs, strict=True)
        if needed and t is not None
    ]


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, codes, row_absmax, _, A, B, *numbers, _ = inputs
    ctx.recompute_x, x_parts = recompute.saved_for(x, A is not None and A.requires_grad)
    s = output[1] if B is not None and B.requires_grad else None
    ctx.save_for_backward(codes, row_absmax, A, B, s, *x_parts)
    ctx.numbers = numbers


def _backward(ctx: Any, needs: Sequence[bool], dy: Tensor) -> tuple[Tensor | None, ...]:
    codes, row_absmax, A, B, s, *x_parts = ctx.saved_tensors
    needs_x, needs_bias, needs_A, needs_B = needs
    dbias = rows(dy).sum(0) if needs_bias else None
    wanted = [needs_x, needs_A, needs_B]
    grads: Sequence[Tensor] = []
    if any(wanted):
        x = recompute.restore(ctx.recompute_x, x_parts)
        grads = _backward_op(dy, codes, row_absmax, x, A, B, s, *ctx.numbers, wanted)
    found = iter(grads)
    dx, dA, dB = (next(found) if needed else None for needed in wanted)
    return dx, dbias, dA, dB


_forward_op = Op(
    "int8_compute_linear",
    "(Tensor x, Tensor codes, Tensor row_absmax, Tensor? bias, Tensor? A, Tensor? B, float scale, float p,"
    " int seed, float? outlier) -> (Tensor, Tensor)",
    forward,
    _empty_outputs,
)
int8_compute_linear_triton = Differentiable(_forward_op, ("x", "bias", "A", "B"), _keep, _backward)
_backward_op = Op(
    "int8_compute_linear_backward",
    "(Tensor dy, Tensor codes, Tensor row_absmax, Tensor? x, Tensor? A, Tensor? B, Tensor? s, float scale,"
    " float p, int seed, bool[] needs) -> Tensor[]",
    backward,
    _like_grads,
)


def run_triton(
    x: Tensor, q: Int8Weight, bias: Tensor | None, lora: LoRA | None, outlier: float | None
) -> Tensor:
    """``int8_compute_linear`` on Triton."""
    A, B, numbers = (
        (None, None, (0.0, 0.0, 0)) if lora is None else (lora.A, lora.B, lora.numbers())
    )
    return int8_compute_linear_triton(x, *q.tensors(), bias, A, B, *numbers, outlier)
