"""``nf4_linear`` and ``int8_linear`` by Triton kernels, as torch.library ops: traceable, and differentiable once.

With few rows one kernel decodes the weight in its loop. With many rows the weight is decoded into the workspace, then the
schedule of ``lora_linear`` runs. The backward decodes again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core import recompute
from peftkit_kernels.core.launch import cdiv, dot_precision, launch, target_of
from peftkit_kernels.core.op import Differentiable, Op
from peftkit_kernels.low_rank import LoRA, adapter_dtype, cast, passes, rows
from peftkit_kernels.low_rank.config import block_r
from peftkit_kernels.ops.lora_linear import triton_impl as dense
from peftkit_kernels.ops.lora_linear.torch_impl import unflatten
from peftkit_kernels.ops.lora_qkv.triton_impl import linear
from peftkit_kernels.ops.quantized_linear.config import SmallConfig, nf4_step, small_rows
from peftkit_kernels.storage.int8 import Int8Weight
from peftkit_kernels.storage.nf4 import NF4Weight
from peftkit_kernels.storage.nf4.triton_impl import absmax_arguments, absmax_constants, words_of
from peftkit_kernels.storage.quantized import QuantizedWeight, decode_triton, layout_of, rebuild


@functools.cache
def _kernels() -> Any:
    from peftkit_kernels.ops.quantized_linear import kernels

    return kernels


def decodes_in_product(M: int, q: QuantizedWeight, target: Any) -> bool:
    """Whether ``small_m`` runs: ``M`` rows are few enough, and the kernel can read ``q``."""
    N, K = q.shape
    if isinstance(q, NF4Weight) and not (nf4_step(K, q.blocksize) and words_of(q.packed)[1]):
        return False
    return small_rows(N, target=target) >= M


def small_m(
    x: Tensor,
    q: QuantizedWeight,
    bias: Tensor | None,
    s: Tensor | None,
    B: Tensor | None,
    scale: float,
    *,
    config: SmallConfig | None = None,
) -> Tensor:
    """``x Wᵀ + scale · s Bᵀ + bias`` with W decoded in the loop; a stored byte is read once for each tile of up to 64 rows.

    Args:
        x: ``[M, K]``, at least one row.
        q: The weight; 4-bit rows are whole steps (``nf4_step``) of whole words.
        bias: ``[N]`` in the dtype of ``x``, or ``None``.
        s: ``[M, R]``, or ``None``.
        B: ``[N, R]`` in the dtype of ``s``, or ``None``.
        scale: Factor on the update.
        config: Replaces the configuration that would be chosen.
    """
    (M, K), N, x = x.shape, q.shape[0], passes.readable(x)
    four_bit = isinstance(q, NF4Weight)
    c = config or SmallConfig.choose(
        *(M, N, K),
        block_k=nf4_step(K, q.blocksize) if four_bit else 64,
        itemsize=x.element_size(),
        four_bit=four_bit,
        nested=four_bit and q.nested is not None,
        target=target_of(x),
    )
    steps = cdiv(cdiv(K, c.block_k), c.splits)
    splits = cdiv(cdiv(K, c.block_k), steps)
    y = x.new_empty(M, N)
    partial = y if splits == 1 else x.new_empty(splits, M, N, dtype=torch.float32)
    R = 0 if s is None else s.shape[1]
    grid = cdiv(N, c.block_n), splits, cdiv(M, c.block_m)
    update = s, B, bias, partial, scale
    factors = (0, 0, 0) if s is None or B is None else (s.stride(0), *B.stride())
    constants = {
        "HAS_LORA": s is not None,
        "HAS_BIAS": bias is not None,
        "BLOCK_M": c.block_m,
        "BLOCK_N": c.block_n,
        "BLOCK_K": c.block_k,
        "BLOCK_R": block_r(max(R, 1)),
        "PRECISION": dot_precision(x.dtype, s),
        "num_warps": c.num_warps,
        "num_stages": c.num_stages,
    }
    if isinstance(q, Int8Weight):
        launch(
            _kernels().int8_small_m_kernel,
            grid,
            *(x, q.codes, q.row_absmax, *update, M, N, K, R, steps),
            *(x.stride(0), *q.codes.stride(), *factors, N),
            **constants,
        )
    else:
        launch(
            _kernels().nf4_small_m_kernel,
            grid,
            *(x, words_of(q.packed)[0], *absmax_arguments(q), *update, M, N, K, R, steps),
            *(x.stride(0), *factors, N),
            **absmax_constants(q),
            **constants,
        )
    if splits > 1:
        passes.add_up(partial, y)
    return y


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
    flat, dtype, weight = rows(x), x.dtype, rebuild(q, layout)
    if decodes_in_product(flat.shape[0], weight, target_of(x)):
        s = factor = None
        if A is not None and B is not None:
            wide = adapter_dtype(x, A)
            s, factor = passes.shrink(flat, cast(A, wide), p, seed), cast(B, wide)
        bias = None if bias is None else cast(bias, dtype)
        y = small_m(flat, weight, bias, s, factor, scale)
        return unflatten(y, x.shape), flat.new_empty(flat.shape[0], 0) if s is None else s
    W = decode_triton(weight, dtype)
    if A is None or B is None:
        return unflatten(linear(flat, W, bias), x.shape), flat.new_empty(flat.shape[0], 0)
    return dense.forward(x, W, bias, A, B, scale, p, seed)


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
