"""Every kernel and configuration the dispatcher can choose, by op: what would be launched at real sizes on a given GPU.

The launches are recorded from the implementations themselves, on meta tensors, so the machine code that is inspected is that
of the kernels that run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.launch import Launch, Target, recording

RANKS = (16, 32, 64, 128)
QUICK_RANKS = (16, 64)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUICK_DTYPES = (torch.bfloat16,)

_SEED = 2**62 + 1
_M = 8192
_SMS = {
    "cuda:80": 108,
    "cuda:86": 84,
    "cuda:89": 128,
    "cuda:90": 132,
    "cuda:100": 148,
    "cuda:120": 170,
    "hip:gfx942": 304,
}
"""Of the largest part: A100, RTX 3090, RTX 4090, H100, B200, RTX 5090, MI300X."""


def launches(
    op: str,
    arch: str,
    *,
    ranks: Sequence[int] = QUICK_RANKS,
    dtypes: Sequence[torch.dtype] = QUICK_DTYPES,
) -> list[Launch]:
    """What ``op`` launches, forward and backward, for every rank and dtype given, with and without dropout.

    Args:
        op: A key of ``OPS``.
        arch: One of ``aot.ARCHS``.
        ranks: Of the adapters.
        dtypes: Of the activations.
    """
    with recording(Target(arch, _SMS[arch])) as found:
        for dtype in dtypes:
            for rank in ranks:
                OPS[op](rank, dtype)
    return found


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _lora_linear(rank: int, dtype: torch.dtype) -> None:
    from peftkit_kernels.lora_linear.triton_impl import backward, forward

    def run(M: int, N: int, K: int, p: float, bias: bool, needs: list[bool]) -> None:
        x, weight = _meta(M, K, dtype=dtype), _meta(N, K, dtype=dtype)
        factors = _meta(rank, K, dtype=dtype), _meta(N, rank, dtype=dtype)
        numbers = 2.0, p, _SEED
        b = _meta(N, dtype=dtype) if bias else None
        y, s = forward(x, weight, b, *factors, *numbers)
        backward(torch.empty_like(y), weight, x, *factors, s, *numbers, needs)

    for p in (0.0, 0.1):
        run(_M, 4096, 4096, p, False, [True, True, True])
        run(_M, 1024, 2048, p, True, [True, True, True])
    run(_M, 4096, 4096, 0.0, True, [False, False, True])
    run(256, 4096, 4096, 0.0, False, [True, False, False])


def _lora_qkv(rank: int, dtype: torch.dtype) -> None:
    from peftkit_kernels.lora_qkv.triton_impl import backward, compact, forward
    from peftkit_kernels.low_rank import LoRA

    K, widths = 4096, (4096, 1024, 1024)
    x, weights = _meta(_M, K, dtype=dtype), [_meta(n, K, dtype=dtype) for n in widths]
    for p, shared in ((0.0, True), (0.1, True), (0.1, False)):
        loras = [
            LoRA(_meta(rank, K, dtype=dtype), _meta(n, rank, dtype=dtype), 2.0, p, seed)
            for n, seed in zip(widths, (_SEED,) * 3 if shared else range(3), strict=True)
        ]
        arguments = compact([None] * 3, loras)
        ys, joint = forward(x, weights, *arguments)
        dys = [torch.empty_like(y) for y in ys]
        _, As, Bs, _, *numbers = arguments
        backward(dys, weights, x, As, Bs, joint, *numbers, True, True, [True] * 3)


def _lora_swiglu_mlp(rank: int, dtype: torch.dtype) -> None:
    from peftkit_kernels.lora_qkv.triton_impl import compact
    from peftkit_kernels.lora_swiglu_mlp.config import obstacle
    from peftkit_kernels.lora_swiglu_mlp.triton_impl import backward, forward
    from peftkit_kernels.low_rank import LoRA

    if obstacle(rank, dtype.itemsize):
        return
    D, F = 4096, 14336
    sizes = ((F, D), (F, D), (D, F))
    x, weights = _meta(_M, D, dtype=dtype), [_meta(*size, dtype=dtype) for size in sizes]
    # the dropout adds to every activation alike
    for act, p in (("silu", 0.0), ("silu", 0.1), ("gelu", 0.1), ("gelu_tanh", 0.1)):
        loras = [
            LoRA(_meta(rank, K, dtype=dtype), _meta(N, rank, dtype=dtype), 2.0, p, _SEED + i)
            for i, (N, K) in enumerate(sizes)
        ]
        arguments = compact([None] * 3, loras)
        y, e, g, s = forward(x, weights, *arguments, act)
        _, As, Bs, _, *numbers = arguments
        needs = True, [False, False], [True] * 3, [True] * 3
        backward(y, weights, x, e, g, As, Bs, s, *numbers, act, *needs)


def _bottleneck(rank: int, dtype: torch.dtype) -> None:
    from peftkit_kernels.bottleneck.config import MAX_BOTTLENECK
    from peftkit_kernels.bottleneck.triton_impl import backward, forward

    D, act = 4096, "gelu"
    for R in sorted({rank, min(4 * rank, MAX_BOTTLENECK)}):  # wider than any adapter's rank
        bias, wide = _meta(R, dtype=dtype), _meta(D, dtype=dtype)
        down, up = _meta(R, D, dtype=dtype), _meta(D, R, dtype=dtype)
        for M in (_M, 1024):
            h = _meta(M, D, dtype=dtype)
            y, z = forward(h, down, bias, up, wide, 1.0, act)
            backward(y, h, z, down, up, 1.0, act, [True] * 4)


def _frozen_norm(rank: int, dtype: torch.dtype) -> None:
    from peftkit_kernels.frozen_norm.triton_impl import backward, layer_forward, rms_forward

    del rank  # a norm has none
    for K in (64, 4096, 16384):  # many rows a program, one, and the longest
        x, weight = _meta(_M, K, dtype=dtype), _meta(K, dtype=dtype)
        for offset, round_first in ((0.0, True), (1.0, False)):
            y, rstd = rms_forward(x, weight, 1e-6, offset, round_first)
            backward(y, x, weight, None, rstd, offset)
        y, mean, rstd = layer_forward(x, weight, weight, 1e-6)
        backward(y, x, weight, mean, rstd, 0.0)


def _linear_cross_entropy(rank: int, dtype: torch.dtype) -> None:
    from peftkit_kernels.linear_cross_entropy.reference import RowLoss
    from peftkit_kernels.linear_cross_entropy.triton_impl import xent_rows_triton_

    del rank  # the adapter of a head takes the library's products
    z = _meta(1024, 128256, dtype=dtype)
    target = _meta(1024, dtype=torch.int64)
    for row_loss in (RowLoss(), RowLoss(1.0, None, 0.1, 1e-4), RowLoss(0.5, 30.0, 0.1, 1e-4)):
        for want_grad in (True, False):
            xent_rows_triton_(z, target, row_loss, ignored=None, want_grad=want_grad)


OPS: dict[str, Callable[..., Any]] = {
    "lora_linear": _lora_linear,
    "lora_qkv": _lora_qkv,
    "lora_swiglu_mlp": _lora_swiglu_mlp,
    "bottleneck": _bottleneck,
    "frozen_norm": _frozen_norm,
    "linear_cross_entropy": _linear_cross_entropy,
}
"""Ops with Triton kernels."""
