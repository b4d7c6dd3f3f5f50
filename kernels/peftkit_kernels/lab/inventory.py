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


def _linear_cross_entropy(rank: int, dtype: torch.dtype) -> None:
    from peftkit_kernels.linear_cross_entropy.triton_impl import deferred, forward

    M, D, V = 1024, 4096, 128256
    hidden, weight = _meta(M, D, dtype=dtype), _meta(V, D, dtype=dtype)
    target = _meta(M, dtype=torch.int64)
    factors = _meta(rank, D, dtype=dtype), _meta(V, rank, dtype=dtype)
    frozen, adapted = [True, *[False] * 4], [True, False, False, True, True]
    sizes = -100, M, dtype
    for row_loss in ((1.0, None, 0.0, 0.0), (1.0, None, 0.1, 1e-4), (0.5, 30.0, 0.1, 1e-4)):
        for needs in (frozen, [False] * 5):
            forward(
                *(hidden, weight, None, None, None, target),
                *(1.0, *row_loss, *sizes, False, needs),
            )
        dloss = _meta(M, dtype=torch.float32)
        deferred(
            *(dloss, hidden, weight, _meta(V, dtype=dtype), *factors, target),
            *(2.0, *row_loss, *sizes, adapted),
        )


def _grouped_lora(rank: int, dtype: torch.dtype) -> None:
    from peftkit_kernels.grouped_lora.config import obstacle
    from peftkit_kernels.grouped_lora.plan import plan_groups
    from peftkit_kernels.grouped_lora.triton_impl import backward, forward, table_of

    E, K, N = 32, 4096, 4096
    factors = _meta(E, rank, K, dtype=dtype), _meta(E, N, rank, dtype=dtype)
    for M, block in ((_M, 64), (_M, 16), (64, 16), (64, 64)):
        if obstacle(block, rank, itemsize=dtype.itemsize):
            continue
        plan = plan_groups(_meta(M, dtype=torch.int64), E, block=block)
        y, x = _meta(M, N, dtype=dtype), _meta(M, K, dtype=dtype)
        scale, tables = _meta(E, dtype=torch.float32), table_of(plan)
        out, s = forward(y, x, *factors, scale, *tables)
        backward(out, x, *factors, s, scale, *tables, [True] * 3)


def _prefix_attention(rank: int, dtype: torch.dtype) -> None:
    from peftkit_kernels.prefix_attention.triton_impl import add_gated, gate_grad, merge

    del rank
    H = 32
    gate = _meta(H, dtype=dtype)
    for S, D in ((2048, 64), (2048, 128), (2048, 256), (1, 128)):
        o = _meta(2, S, H, D, dtype=dtype)
        lse = _meta(2, H, S, dtype=torch.float32)
        merge(o, lse, o, lse)
        add_gated(o, o, gate)
        gate_grad(o, o, gate)


OPS: dict[str, Callable[..., Any]] = {
    "lora_linear": _lora_linear,
    "lora_qkv": _lora_qkv,
    "linear_cross_entropy": _linear_cross_entropy,
    "grouped_lora": _grouped_lora,
    "prefix_attention": _prefix_attention,
}
"""Ops with Triton kernels."""
