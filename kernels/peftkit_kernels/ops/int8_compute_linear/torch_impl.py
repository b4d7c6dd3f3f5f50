"""``int8_compute_linear`` on the CPU: one pass quantises, a product multiplies the codes, one pass scales and adds the rest."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels import low_rank, native
from peftkit_kernels.core import recompute, workspace
from peftkit_kernels.core.autograd import once_differentiable
from peftkit_kernels.core.checks import without_autocast
from peftkit_kernels.low_rank import cast, rows
from peftkit_kernels.ops.int8_compute_linear.reference import outlier_columns
from peftkit_kernels.ops.lora_linear.torch_impl import add_update_grad, unflatten
from peftkit_kernels.ops.lora_qkv.torch_impl import Numbers, make_loras
from peftkit_kernels.storage.int8 import Int8Weight
from peftkit_kernels.storage.int8.reference import quantize_rows_reference


@functools.cache
def multiplies_int8() -> bool:
    """Whether this processor has 8-bit products (AVX-512 VNNI or AMX) that ``torch._int_mm`` can use.

    Without them ``torch._int_mm`` multiplies one element at a time, so the codes are multiplied as float32 instead.
    """
    return torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()


def quantize(x: Tensor, column_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The codes of ``x ∘ column_scale`` by rows, in the workspace, and the step of each row, ``Float32[M]``."""
    if native.supports(x):
        codes = workspace.take(x.shape, torch.int8, x.device)
        absmax = native.quantize_rows(x, column_scale, codes)
    else:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if column_scale is not None:
            wide = wide * column_scale
        codes, absmax = quantize_rows_reference(wide)
    return codes, absmax.div_(127)


def product(codes: Tensor, weight: Tensor) -> Tensor:
    """``codes weight`` for ``Int8[M, K]`` and ``Int8[K, N]``: ``Int32[M, N]``, or float32 without 8-bit products."""
    M, (K, N) = codes.shape[0], weight.shape
    if 1 not in weight.stride():
        weight = weight.contiguous()
    if K == 1:
        # torch 2.13 uses wrong strides for a single column
        return codes.int() * weight.int()
    if codes.device.type == "cpu" and multiplies_int8():
        out = workspace.take((M, N), torch.int32, codes.device)
        return torch.ops.aten._int_mm.out(codes, weight, out=out)
    # the sizes for which cuBLAS has 8-bit products
    if codes.device.type == "cuda" and M > 16 and K % 8 == 0 and N % 8 == 0:
        return torch.ops.aten._int_mm(codes, weight)
    with without_autocast(codes):
        return torch.mm(codes.float(), weight.float())


def epilogue(
    acc: Tensor,
    row_scale: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    s: Tensor | None,
    t: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``acc · row_scale · column_scale + bias + s t``, summed in float32 (float64 if ``dtype`` is float64) and rounded once."""
    wide = torch.promote_types(dtype, torch.float32)
    parts = [
        None if part is None else cast(part, wide).contiguous()
        for part in (column_scale, bias, s, t)
    ]
    if dtype is torch.float32 and acc.dtype is torch.int32 and native.supports(row_scale):
        return native.int8_epilogue(acc, row_scale, *parts)
    column_scale, bias, s, t = parts
    y = acc * row_scale.to(wide)[:, None]
    if column_scale is not None:
        y.mul_(column_scale)
    if bias is not None:
        y.add_(bias)
    if s is not None and t is not None:
        y.addmm_(s, t)
    return cast(y, dtype)


class Int8ComputeLinear(torch.autograd.Function):
    """With ``s = drop(x) Aᵀ``, ``ds = scale · dy B`` and ``(g8, sg)`` the codes and steps of ``dy ∘ sw`` by rows:

    ``dB = scale · dyᵀ s``, ``dA = dsᵀ drop(x)``, ``dx = sg · g8 W8 + mask ∘ (ds A)``, ``dbias = Σ dy``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        q: Int8Weight,
        bias: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        numbers: Numbers | None,
        threshold: float | None,
    ) -> Tensor:
        (lora,) = make_loras([A], [B], [numbers])
        flat = rows(x)
        s = t = None
        if lora is not None:
            s = low_rank.shrink(flat, lora.A, lora.p, lora.seed)
            t = cast(lora.B, torch.promote_types(s.dtype, torch.float32)).t() * lora.scale
        outliers, inner = outlier_columns(flat, threshold), flat
        outliers = None if outliers is None else outliers.nonzero().view(-1)
        if outliers is not None and outliers.numel():
            inner = flat.index_fill(1, outliers, 0.0)
        bias = None if bias is None else cast(bias, x.dtype)
        codes, step = quantize(inner.contiguous(), None)
        y = epilogue(product(codes, q.codes.t()), step, q.row_scale(), bias, s, t, x.dtype)
        # outlier columns are multiplied with the decoded weight, in the dtype of x
        if outliers is not None and outliers.numel():
            wide = torch.promote_types(x.dtype, torch.float32)
            weight = q.codes[:, outliers] * q.row_scale().to(wide)[:, None]
            y.addmm_(flat[:, outliers], cast(weight, x.dtype).t())
        _, _, _, needs_A, needs_B, _, _ = ctx.needs_input_grad
        ctx.recompute_x, x_parts = recompute.saved_for(x, needs_A)
        ctx.save_for_backward(A, B, s if needs_B else None, *x_parts)
        ctx.q, ctx.numbers, ctx.shape = q, numbers, x.shape
        return unflatten(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        A, B, s, *x_parts = ctx.saved_tensors
        (lora,) = make_loras([A], [B], [ctx.numbers])
        needs_x, _, needs_bias, needs_A, needs_B, _, _ = ctx.needs_input_grad
        dy = rows(dy)
        dbias = dy.sum(0) if needs_bias else None
        dx = dA = dB = ds = None
        if lora is not None and needs_B:
            dB = low_rank.grad_b(dy, s, lora.scale, lora.B)
        if lora is not None and (needs_x or needs_A):
            ds = low_rank.grad_s(dy, lora.B, lora.scale)
        if needs_A:
            x = recompute.restore(ctx.recompute_x, x_parts)
            dA = low_rank.grad_a(ds, rows(x), lora.A.dtype, lora.p, lora.seed)
        if needs_x:
            dx = _input_grad(dy, ctx.q, ds, lora).view(ctx.shape)
        return dx, None, dbias, dA, dB, None, None


def _input_grad(dy: Tensor, q: Int8Weight, ds: Tensor | None, lora: Any) -> Tensor:
    """``sg · g8 W8 + mask ∘ (ds A)``."""
    codes, step = quantize(dy.contiguous(), q.row_scale())
    acc = product(codes, q.codes)
    if lora is None or lora.p == 0.0:
        t = None if lora is None else lora.A
        return epilogue(acc, step, None, None, ds, t, dy.dtype)
    # the mask applies to ds A alone, so the epilogue cannot add it
    return add_update_grad(epilogue(acc, step, None, None, None, None, dy.dtype), ds, lora)
