"""DoRA by Triton kernels around the library's GEMMs, as torch.library ops: traceable, and differentiable once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core import recompute
from peftkit_kernels.core.launch import cdiv, dot_precision, launch, target_of
from peftkit_kernels.core.op import Differentiable, Op
from peftkit_kernels.low_rank import LoRA, adapter_dtype, cast, passes, rows, unflatten
from peftkit_kernels.low_rank.config import block_r, looped_ranks
from peftkit_kernels.ops.dora.config import MagnitudeConfig, NormConfig
from peftkit_kernels.ops.dora.torch_impl import folds, scaled_weight
from peftkit_kernels.ops.dora_scale.passes import scale_forward
from peftkit_kernels.ops.lora_linear.triton_passes import project
from peftkit_kernels.storage.int8 import Int8Weight
from peftkit_kernels.storage.nf4 import NF4Weight
from peftkit_kernels.storage.nf4.triton_impl import absmax_arguments, absmax_constants, words_of
from peftkit_kernels.storage.quantized import (
    Weight,
    arguments_of,
    decode_triton,
    dense_triton,
    weights_of,
)

_NO_BLOCKS = {"NESTED": False, "BLOCKSIZE": 8, "NESTED_BLOCK": 1}


@functools.cache
def _kernels() -> Any:
    from peftkit_kernels.ops.dora import kernels

    return kernels


def weight_norm(
    weight: Weight, A: Tensor, B: Tensor, scale: float, *, config: NormConfig | None = None
) -> Tensor:
    """``|W + scale · B A|`` of every row, ``Float32[N]``, with one read of the stored weight for each tile of ranks.

    The product with A is 16-bit if A is 16-bit and a dense weight is too; sums are float32. A 4-bit weight whose rows are not
    whole words, and a float8 weight, are decoded first.
    """
    N, K = weight.shape
    norm = A.new_empty(N, dtype=torch.float32)
    if not N or not K:
        return norm.zero_()
    has_words = isinstance(weight, NF4Weight) and not K % 8 and words_of(weight.packed)[1]
    if not (isinstance(weight, (Tensor, Int8Weight)) or has_words):
        weight = decode_triton(weight, torch.float32)
    dtype = A.dtype
    if isinstance(weight, Tensor):
        dtype = torch.promote_types(dtype, weight.dtype)
        storage, stored, constants = "dense", (weight, None, None, None, None), _NO_BLOCKS
        strides = tuple(weight.stride())
    elif isinstance(weight, Int8Weight):
        storage, stored = "int8", (weight.codes, weight.row_absmax, None, None, None)
        strides, constants = tuple(weight.codes.stride()), _NO_BLOCKS
    elif isinstance(weight, NF4Weight):
        storage, stored = "nf4", (words_of(weight.packed)[0], *absmax_arguments(weight))
        strides, constants = (0, 0), absmax_constants(weight)
    else:
        raise TypeError(f"the kernel reads no {type(weight).__name__}")
    R, float_A, float_B = A.shape[0], A.float(), B.float()
    # torch computes these small products, [R, R] and [N, R], because they would take registers in the kernel
    update = (float_B @ (float_A @ float_A.t())).mul_(float_B).sum(1).mul_(scale * scale)
    A = cast(A, dtype)
    tile = looped_ranks(R)
    c = config or NormConfig.choose(tile, itemsize=A.element_size())
    launch(
        _kernels().norm_kernel,
        (cdiv(N, c.block_n),),
        *(*stored, A, B, update, norm, scale, N, K, R),
        *(*strides, *A.stride(), *B.stride()),
        STORAGE=storage,
        **constants,
        BLOCK_N=c.block_n,
        BLOCK_K=c.block_k,
        BLOCK_R=block_r(tile),
        TILES=cdiv(R, tile),
        PRECISION=dot_precision(dtype),
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )
    return norm


def magnitude_grad(
    dy: Tensor,
    y: Tensor,
    bias: Tensor | None,
    divisor: Tensor,
    dtype: torch.dtype,
    *,
    config: MagnitudeConfig | None = None,
) -> Tensor:
    """``Σ dy ∘ (y - bias) / divisor``, ``[N]`` in ``dtype``; dy and y are read once."""
    (M, N), dy, y = dy.shape, passes.readable(dy), passes.readable(y)
    c = config or MagnitudeConfig.choose(M, N, target=target_of(dy))
    chunks = cdiv(M, c.chunk_m)
    total = dy.new_empty(1, N, dtype=torch.float32)
    partial = total if chunks == 1 else dy.new_empty(chunks, 1, N, dtype=torch.float32)
    launch(
        _kernels().magnitude_grad_kernel,
        (chunks, cdiv(N, c.block_n)),
        *(dy, y, bias, partial, M, N, c.chunk_m, dy.stride(0), y.stride(0)),
        HAS_BIAS=bias is not None,
        BLOCK_M=c.block_m,
        BLOCK_N=c.block_n,
        num_warps=c.num_warps,
        num_stages=1,
    )
    if chunks > 1:
        passes.add_up(partial, total)
    return cast(total[0].div_(divisor.float()), dtype)


def forward(
    x: Tensor,
    weight: Sequence[Tensor],
    storage: Sequence[int],
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    scale: float,
    p: float,
    seed: int,
    keep_direction: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward of ``dora_linear``, and the tensors that its backward needs.

    Returns:
        ``y``, ``[..., N]``; ``s = drop(x) Aᵀ``, ``[M, R]``; ``g = magnitude / norm``, ``[N]``; and the direction
        ``x Wᵀ + scale · s Bᵀ``, ``[M, N]`` if it is kept, else ``[0, N]``.
    """
    if not x.numel():
        numbers = scale, p, seed, keep_direction
        y, s, g, z = _empty_outputs(x, weight, storage, bias, A, B, magnitude, norm, *numbers)
        return y, s, g.copy_(cast(magnitude, norm.dtype) / norm), z
    flat, dtype, W = rows(x), x.dtype, weights_of(weight, storage)[0]
    g = cast(magnitude, norm.dtype) / norm
    wide = adapter_dtype(x, A)
    s = passes.shrink(flat, cast(A, wide), p, seed)
    bias = None if bias is None else cast(bias, dtype)
    z = flat.new_empty(0, W.shape[0])
    if keep_direction:
        z = project(flat, dense_triton(W, dtype), s, cast(B, wide), scale)
        y = scale_forward(z, g, bias)
    elif isinstance(W, Tensor) and not folds(flat.shape[0], W):
        y = project(flat, W, s, cast(B, wide), scale)
        y = y.mul_(g) if bias is None else torch.addcmul(bias, y, g, out=y)
    else:
        factor = cast(B * g[:, None], wide)
        y = project(flat, scaled_weight(W, g, dtype, decode_triton), s, factor, scale, bias=bias)
    return unflatten(y, x.shape), s, g, z


def _empty_outputs(
    x: Tensor,
    weight: Sequence[Tensor],
    storage: Sequence[int],
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    scale: float,
    p: float,
    seed: int,
    keep_direction: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, M = weights_of(weight, storage)[0].shape[0], x.shape[:-1].numel()
    y = x.new_empty(*x.shape[:-1], N)
    s = x.new_empty(M, A.shape[0], dtype=adapter_dtype(x, A))
    z = x.new_empty(M if keep_direction else 0, N)
    return y, s, norm.new_empty(norm.shape), z


def backward(
    dy: Tensor,
    weight: Sequence[Tensor],
    storage: Sequence[int],
    x: Tensor | None,
    y: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    norm: Tensor | None,
    g: Tensor,
    s: Tensor | None,
    scale: float,
    p: float,
    seed: int,
    keep_direction: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Those of ``dx``, ``dA``, ``dB`` and ``dmagnitude`` that ``needs`` selects. If the direction was kept, it is passed as ``y``."""
    if not dy.numel():
        return [
            grad.zero_()
            for grad in _like_grads(
                *(dy, weight, storage, x, y, bias, A, B, magnitude, norm, g, s),
                *(scale, p, seed, keep_direction, needs),
            )
        ]
    needs_x, needs_A, needs_B, needs_magnitude = needs
    flat, dtype, W = rows(dy), dy.dtype, weights_of(weight, storage)[0]
    wide = adapter_dtype(dy, A)
    factor = cast(B * g[:, None], wide)
    dx = dA = dB = ds = dmagnitude = None
    if needs_magnitude and norm is not None:
        dmagnitude = magnitude_grad(flat, y, None, cast(norm, torch.float32), magnitude.dtype)
    elif needs_magnitude:
        dmagnitude = magnitude_grad(flat, rows(y), bias, magnitude, magnitude.dtype)
    if needs_B and (needs_x or needs_A):
        dB, ds = passes.grad_b_and_s(flat, s, factor, scale, torch.float32)
    elif needs_B:
        dB = passes.grad_b(flat, s, scale, torch.float32)
    elif needs_x or needs_A:
        ds = passes.grad_s(flat, factor, scale)
    if dB is not None:
        dB = cast(dB.mul_(g[:, None]), B.dtype)
    if needs_A:
        dA = passes.grad_a(ds, rows(x), A.dtype, p, seed)
    if needs_x:
        if keep_direction or (isinstance(W, Tensor) and not folds(flat.shape[0], W)):
            flat = scale_forward(flat, g, None)
            full = dense_triton(W, dtype)
        else:
            full = scaled_weight(W, g, dtype, decode_triton)
        dx = project(flat, full.t(), ds, cast(A, wide).t(), 1.0, p=p, seed=seed)
        dx = unflatten(dx, dy.shape)
    return [grad for grad in (dx, dA, dB, dmagnitude) if grad is not None]


def _like_grads(
    dy: Tensor,
    weight: Sequence[Tensor],
    storage: Sequence[int],
    x: Tensor | None,
    y: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    norm: Tensor | None,
    g: Tensor,
    s: Tensor | None,
    scale: float,
    p: float,
    seed: int,
    keep_direction: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    K = weights_of(weight, storage)[0].shape[1]
    like = dy.new_empty(*dy.shape[:-1], K), A, B, magnitude
    return [t.new_empty(t.shape) for t, needed in zip(like, needs, strict=True) if needed]


def _norm_op(
    weight: Sequence[Tensor], storage: Sequence[int], A: Tensor, B: Tensor, scale: float
) -> Tensor:
    return weight_norm(weights_of(weight, storage)[0], A, B, scale)


def _norm_like(
    weight: Sequence[Tensor], storage: Sequence[int], A: Tensor, B: Tensor, scale: float
) -> Tensor:
    return A.new_empty(weights_of(weight, storage)[0].shape[0], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, weight, storage, bias, A, B, magnitude, norm, *numbers, keep_direction = inputs
    ctx.recompute_x, x_parts = recompute.saved_for(x, A.requires_grad)
    y, s, g, z = output
    kept_y = (z if keep_direction else y) if magnitude.requires_grad else None
    kept_s, kept_norm = s if B.requires_grad else None, norm if keep_direction else None
    ctx.save_for_backward(kept_y, bias, A, B, magnitude, kept_norm, g, kept_s, *weight, *x_parts)
    ctx.storage, ctx.stored, ctx.numbers = storage, len(weight), (*numbers, keep_direction)


def _backward(ctx: Any, needs: Sequence[bool], dy: Tensor) -> tuple[Tensor | None, ...]:
    y, bias, A, B, magnitude, norm, g, s, *more = ctx.saved_tensors
    weight, x_parts = more[: ctx.stored], more[ctx.stored :]
    needs_x, needs_bias, needs_A, needs_B, needs_magnitude = needs
    dbias = rows(dy).sum(0) if needs_bias else None
    wanted = [needs_x, needs_A, needs_B, needs_magnitude]
    grads: Sequence[Tensor] = []
    if any(wanted):
        x = recompute.restore(ctx.recompute_x, x_parts)
        tensors = weight, ctx.storage, x, y, bias, A, B, magnitude, norm, g, s
        grads = _backward_op(dy, *tensors, *ctx.numbers, wanted)
    found = iter(grads)
    dx, dA, dB, dmagnitude = (next(found) if needed else None for needed in wanted)
    return dx, dbias, dA, dB, dmagnitude


dora_norm_triton = Op(
    "dora_norm",
    "(Tensor[] weight, int[] storage, Tensor A, Tensor B, float scale) -> Tensor",
    _norm_op,
    _norm_like,
)
_linear_op = Op(
    "dora_linear",
    "(Tensor x, Tensor[] weight, int[] storage, Tensor? bias, Tensor A, Tensor B, Tensor magnitude, Tensor norm,"
    " float scale, float p, int seed, bool keep_direction) -> (Tensor, Tensor, Tensor, Tensor)",
    forward,
    _empty_outputs,
)
dora_linear_triton = Differentiable(
    _linear_op, ("x", "bias", "A", "B", "magnitude"), _keep, _backward
)
_backward_op = Op(
    "dora_linear_backward",
    "(Tensor dy, Tensor[] weight, int[] storage, Tensor? x, Tensor? y, Tensor? bias, Tensor A, Tensor B,"
    " Tensor magnitude, Tensor? norm, Tensor g, Tensor? s, float scale, float p, int seed, bool keep_direction,"
    " bool[] needs) -> Tensor[]",
    backward,
    _like_grads,
)


def run_triton(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora: LoRA,
    magnitude: Tensor,
    norm: Tensor,
    keep_direction: bool,
) -> Tensor:
    """``dora_linear`` on Triton."""
    tensors = bias, lora.A, lora.B, magnitude, norm
    return dora_linear_triton(x, *arguments_of([weight]), *tensors, *lora.numbers(), keep_direction)
