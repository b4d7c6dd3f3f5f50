"""Every kernel and configuration that the dispatcher can choose, by op: the launches at real sizes on a given GPU.

The implementations themselves are recorded on meta tensors, so the inspected machine code is that of the kernels that run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lab.steps import step
from peftkit_kernels.core.launch import Launch, Target, recording

RANKS = (8, 16, 32, 64, 128, 256)
QUICK_RANKS = (16, 64)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUICK_DTYPES = (torch.bfloat16,)

_SEED = 2**62 + 1


@dataclass(frozen=True, slots=True)
class Sizes:
    """Which sizes 16 does not divide; for them Triton compiles another kernel.

    Attributes:
        odd_rows: Whether numbers of rows are odd, as in a batch of texts.
        odd_widths: Whether widths are odd, so that rows are not aligned and are read element by element.
    """

    odd_rows: bool = False
    odd_widths: bool = False

    def rows(self, M: int = 8192) -> int:
        """``M`` rows, or one less."""
        return M - 1 if self.odd_rows and M > 1 else M

    def widths(self, *sizes: int) -> tuple[int, ...]:
        """``sizes``, or each one less."""
        return tuple(size - self.odd_widths for size in sizes)


EVEN, ODD_ROWS, ODD = Sizes(), Sizes(odd_rows=True), Sizes(odd_rows=True, odd_widths=True)
SIZES = (EVEN, ODD_ROWS, ODD)
_SMS = {
    "cuda:80": 108,
    "cuda:86": 84,
    "cuda:89": 128,
    "cuda:90": 132,
    "cuda:100": 148,
    "cuda:120": 170,
    "hip:gfx942": 304,
}
"""Multiprocessors of A100, RTX 3090, RTX 4090, H100, B200, RTX 5090 and MI300X."""


def known_archs(archs: Iterable[str]) -> list[str]:
    """``archs`` unchanged; raises ``ValueError`` for one that the lab does not compile for."""
    for arch in archs:
        if arch not in _SMS:
            raise ValueError(f"arch={arch!r} is unknown; use one of {', '.join(_SMS)}")
    return list(archs)


def launches(
    op: str,
    arch: str,
    *,
    ranks: Sequence[int] = QUICK_RANKS,
    dtypes: Sequence[torch.dtype] = QUICK_DTYPES,
    sizes: Sequence[Sizes] = (EVEN,),
    mixed: bool = True,
) -> list[Launch]:
    """The launches of ``op``, forward and backward, for all given ranks, dtypes and sizes, with and without dropout.

    Args:
        op: A key of ``OPS``.
        arch: One of ``aot.ARCHS``.
        ranks: Ranks of the adapters.
        dtypes: Dtypes of the activations. The adapters have the same dtype.
        sizes: Some of ``SIZES``.
        mixed: Also record float32 adapters, PEFT's default, on activations of 16 bits.
    """
    with recording(Target(arch, _SMS[arch])) as found:
        for dtype in dtypes:
            for rank in ranks:
                for size in sizes:
                    OPS[op](rank, dtype, size)
                    if mixed and op in MIXED_OPS and dtype is not torch.float32:
                        OPS[op](rank, dtype, size, torch.float32)
    return found


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _lora_linear(
    rank: int, dtype: torch.dtype, sizes: Sizes, factor_dtype: torch.dtype | None = None
) -> None:
    from peftkit_kernels.low_rank import LoRA
    from peftkit_kernels.ops.lora_linear import schedule

    own = factor_dtype or dtype

    def run(M: int, N: int, K: int, p: float, bias: bool, needs: tuple[bool, bool, bool]) -> None:
        M, (N, K) = sizes.rows(M), sizes.widths(N, K)
        x, weight = _meta(M, K, dtype=dtype), _meta(N, K, dtype=dtype)
        lora = LoRA(_meta(rank, K, dtype=own), _meta(N, rank, dtype=own), 2.0, p, _SEED)
        linear = schedule.Linear(weight, _meta(N, dtype=dtype) if bias else None, lora)
        needs_x, needs_A, needs_B = needs
        wanted = schedule.Grads(needs_x, [False], [needs_A], [needs_B])
        step(schedule, schedule.Linears(x, [linear]), wanted)

    for p in (0.0, 0.1):
        run(8192, 4096, 4096, p, False, (True, True, True))
        run(8192, 1024, 2048, p, True, (True, True, True))
    run(8192, 4096, 4096, 0.0, True, (False, False, True))
    run(256, 4096, 4096, 0.0, False, (True, False, False))


def _lora_qkv(
    rank: int, dtype: torch.dtype, sizes: Sizes, factor_dtype: torch.dtype | None = None
) -> None:
    from peftkit_kernels.low_rank import LoRA
    from peftkit_kernels.ops.lora_linear import schedule

    own = factor_dtype or dtype
    K, *widths = sizes.widths(4096, 4096, 1024, 1024)
    x, weights = _meta(sizes.rows(), K, dtype=dtype), [_meta(n, K, dtype=dtype) for n in widths]
    for p, shared in ((0.0, True), (0.1, True), (0.1, False)):
        loras = [
            LoRA(_meta(rank, K, dtype=own), _meta(n, rank, dtype=own), 2.0, p, seed)
            for n, seed in zip(widths, (_SEED,) * 3 if shared else range(3), strict=True)
        ]
        parts = zip(weights, loras, strict=True)
        linears = [schedule.Linear(weight, None, lora) for weight, lora in parts]
        step(schedule, schedule.Linears(x, linears))


def _lora_swiglu_mlp(
    rank: int, dtype: torch.dtype, sizes: Sizes, factor_dtype: torch.dtype | None = None
) -> None:
    from peftkit_kernels.low_rank import LoRA
    from peftkit_kernels.ops.lora_linear.schedule import Linear
    from peftkit_kernels.ops.lora_swiglu_mlp import schedule

    own = factor_dtype or dtype
    D, F = sizes.widths(4096, 14336)
    shapes = ((F, D), (F, D), (D, F))
    x = _meta(sizes.rows(), D, dtype=dtype)
    # dropout adds the same code to every activation, so one case without dropout is enough
    for act, p in (("silu", 0.0), ("silu", 0.1), ("gelu", 0.1), ("gelu_tanh", 0.1)):
        linears = []
        for i, (N, K) in enumerate(shapes):
            factors = _meta(rank, K, dtype=own), _meta(N, rank, dtype=own)
            lora = LoRA(*factors, 2.0, p, _SEED + i)
            linears.append(Linear(_meta(N, K, dtype=dtype), None, lora))
        step(schedule, schedule.MLP(x, linears, act))


def _bottleneck(rank: int, dtype: torch.dtype, sizes: Sizes) -> None:
    from peftkit_kernels.ops.bottleneck import schedule
    from peftkit_kernels.ops.bottleneck.config import MAX_BOTTLENECK

    (D,), act = sizes.widths(4096), "gelu"
    for R in sorted({rank, min(4 * rank, MAX_BOTTLENECK)}):  # a bottleneck may be wider than a rank
        bias, wide = _meta(R, dtype=dtype), _meta(D, dtype=dtype)
        down, up = _meta(R, D, dtype=dtype), _meta(D, R, dtype=dtype)
        for M in (8192, 1024):
            h = _meta(sizes.rows(M), D, dtype=dtype)
            for base in (None, h):
                step(schedule, schedule.Adapter(h, down, bias, up, wide, base, 1.0, act))


def _frozen_norm(rank: int, dtype: torch.dtype, sizes: Sizes) -> None:
    from peftkit_kernels.ops.frozen_norm.config import MAX_WIDTH, obstacle
    from peftkit_kernels.ops.frozen_norm.passes import (
        backward,
        layer_forward,
        rms_forward,
        rms_forward_of_sum,
    )

    del rank  # a norm has none
    # many rows in each program, one row, and the longest rows
    for K in sizes.widths(64, 4096, *MAX_WIDTH.values()):
        x, weight = _meta(sizes.rows(), K, dtype=dtype), _meta(K, dtype=dtype)
        for offset, round_first in ((0.0, True), (1.0, False)):
            if obstacle("frozen_rms_norm", K) is None:
                y, rstd = rms_forward(x, weight, 1e-6, offset, round_first)
                backward(y, x, weight, None, rstd, offset)
                rms_forward_of_sum(x, x, weight, 1e-6, offset, round_first)
                backward(y, x, weight, None, rstd, offset, residual=x)
        if obstacle("frozen_layer_norm", K) is None:
            y, mean, rstd = layer_forward(x, weight, weight, 1e-6)
            backward(y, x, weight, mean, rstd, 0.0)


def _linear_cross_entropy(
    rank: int, dtype: torch.dtype, sizes: Sizes, factor_dtype: torch.dtype | None = None
) -> None:
    from peftkit_kernels.low_rank import LoRA
    from peftkit_kernels.ops.linear_cross_entropy import RowLoss, schedule

    own = factor_dtype or dtype
    M, (D, V) = sizes.rows(1024), sizes.widths(4096, 128256)
    hidden, weight = _meta(M, D, dtype=dtype), _meta(V, D, dtype=dtype)
    target = _meta(M, dtype=torch.int64)
    lora = LoRA(_meta(rank, D, dtype=own), _meta(V, rank, dtype=own), 2.0)
    frozen, adapted = [dtype, *[None] * 4], [dtype, None, None, own, own]
    for numbers in ((1.0, None, 0.0, 0.0), (1.0, None, 0.1, 1e-4), (0.5, 30.0, 0.1, 1e-4)):
        P, options = schedule.TritonPasses(), (RowLoss(*numbers), -100)
        for wanted in (frozen, [None] * 5):
            parts = hidden, weight, None, None, target, *options
            schedule.forward(P, schedule.Head(*parts, False, M, dtype, schedule.Grads(*wanted)))
        parts = hidden, weight, _meta(V, dtype=dtype), lora, target, *options
        wanted = schedule.Grads(*adapted)
        call = schedule.Head(*parts, True, M, dtype, wanted)
        schedule.sweep(P, call, wanted, _meta(M, dtype=torch.float32))


def _nf4_weights(N: int, K: int) -> list[Any]:
    """An NF4 weight with float32 maxima and one with nested maxima, with blocks of 64."""
    from peftkit_kernels.storage.nf4 import NestedAbsmax, NF4Weight

    packed, blocks = _meta(-(-N * K // 2), dtype=torch.uint8), -(-N * K // 64)
    single = NF4Weight(packed, _meta(blocks, dtype=torch.float32), (N, K))
    outer = _meta(256, dtype=torch.float32), _meta(-(-blocks // 256), dtype=torch.float32)
    nested = NestedAbsmax(*outer, _meta(dtype=torch.float32))
    return [single, NF4Weight(packed, _meta(blocks, dtype=torch.uint8), (N, K), 64, nested)]


def _int8_weight(N: int, K: int) -> Any:
    from peftkit_kernels.storage.int8 import Int8Weight

    return Int8Weight(_meta(N, K, dtype=torch.int8), _meta(N, dtype=torch.float32))


def _fp8(rank: int, dtype: torch.dtype, sizes: Sizes) -> None:
    from peftkit_kernels.storage.fp8 import Float8Weight
    from peftkit_kernels.storage.fp8.product.passes import quantize, transposed
    from peftkit_kernels.storage.fp8.triton_impl import dequantize_into

    del rank
    N, K = sizes.widths(4096, 4096)
    q = Float8Weight(_meta(N, K, dtype=torch.float8_e4m3fn), _meta(N, dtype=torch.float32))
    x, scale = _meta(sizes.rows(), K, dtype=dtype), _meta(K, dtype=torch.float32)
    for row_scale in (None, _meta(N, dtype=torch.float32)):
        dequantize_into(q, _meta(N, K, dtype=dtype), row_scale)
    for column_scale in (None, scale):
        quantize(x, column_scale)
    transposed(q)


def _nf4(rank: int, dtype: torch.dtype, sizes: Sizes) -> None:
    from peftkit_kernels.storage.nf4.triton_impl import dequantize_into, quantize
    from peftkit_kernels.storage.nf4.weight import BLOCKSIZES

    del rank
    N, K = sizes.widths(4096, 4096)
    weight = _meta(N, K, dtype=dtype)
    for q in _nf4_weights(N, K):
        for row_scale in (None, _meta(N, dtype=torch.float32)):
            dequantize_into(q, weight, row_scale)
    for blocksize in BLOCKSIZES:
        quantize(weight, blocksize)


def _int8(rank: int, dtype: torch.dtype, sizes: Sizes) -> None:
    from peftkit_kernels.storage.int8.triton_impl import dequantize_into

    del rank
    N, K = sizes.widths(4096, 4096)
    out = _meta(N, K, dtype=dtype)
    for row_scale in (None, _meta(N, dtype=torch.float32)):
        dequantize_into(_int8_weight(N, K), out, row_scale)


def _quantized_linear(
    rank: int, dtype: torch.dtype, sizes: Sizes, factor_dtype: torch.dtype | None = None
) -> None:
    from peftkit_kernels.low_rank import LoRA
    from peftkit_kernels.ops.lora_linear import schedule

    own = factor_dtype or dtype
    # enough columns that all these numbers of rows up to 128 may be decoded in the product
    N, K = sizes.widths(14336, 4096)
    lora = LoRA(_meta(rank, K, dtype=own), _meta(N, rank, dtype=own), 2.0, 0.0, _SEED)
    needs = schedule.Grads(True, [False], [False], [False])
    for q in (*_nf4_weights(N, K), _int8_weight(N, K)):
        for M in (1, 32, 64, 128, 8192):
            x, bias = _meta(sizes.rows(M), K, dtype=dtype), _meta(N, dtype=dtype)
            for adapter in (lora, None):
                call = schedule.Linears(x, [schedule.Linear(q, bias, adapter)])
                if M < 8192:
                    schedule.forward(schedule.TritonPasses(), call)
                else:
                    step(schedule, call, needs)


def _grouped_lora(
    rank: int, dtype: torch.dtype, sizes: Sizes, factor_dtype: torch.dtype | None = None
) -> None:
    from peftkit_kernels.ops.grouped_lora import schedule
    from peftkit_kernels.ops.grouped_lora.config import obstacle
    from peftkit_kernels.ops.grouped_lora.passes import table_of
    from peftkit_kernels.ops.grouped_lora.plan import plan_groups

    own = factor_dtype or dtype
    E, (N, K) = 32, sizes.widths(4096, 4096)
    factors = _meta(E, rank, K, dtype=own), _meta(E, N, rank, dtype=own)
    for rows, block in ((8192, 64), (8192, 16), (64, 16), (64, 64)):
        if obstacle(block, rank, itemsize=dtype.itemsize):
            continue
        M = sizes.rows(rows)
        plan = plan_groups(_meta(M, dtype=torch.int64), E, block=block)
        y, x = _meta(M, N, dtype=dtype), _meta(M, K, dtype=dtype)
        scale = _meta(E, dtype=torch.float32)
        step(schedule, schedule.Grouped(x, y, *factors, scale, table_of(plan)))


def _prefix_attention(rank: int, dtype: torch.dtype, sizes: Sizes) -> None:
    from peftkit_kernels.ops.prefix_attention.passes import add_gated, gate_grad, merge

    del rank
    H = 32
    gate = _meta(H, dtype=dtype)
    for positions, D in ((2048, 64), (2048, 128), (2048, 256), (1, 128)):
        # head sizes stay even, because the library's flash attention supports multiples of 8 only
        S = sizes.rows(positions)
        o = _meta(2, S, H, D, dtype=dtype)
        lse = _meta(2, H, S, dtype=torch.float32)
        merge(o, lse, o, lse)
        add_gated(o, o, gate)
        gate_grad(o, o, gate)


def _int8_compute_linear(
    rank: int, dtype: torch.dtype, sizes: Sizes, factor_dtype: torch.dtype | None = None
) -> None:
    from peftkit_kernels.low_rank import LoRA
    from peftkit_kernels.ops.lora_linear import schedule
    from peftkit_kernels.storage.int8 import Int8ComputeWeight
    from peftkit_kernels.storage.int8.product.passes import quantize

    own = factor_dtype or dtype
    N, K = sizes.widths(4096, 4096)
    q, skip = _int8_weight(N, K).tensors(), _meta(K, dtype=torch.bool)
    A, B = _meta(rank, K, dtype=own), _meta(N, rank, dtype=own)

    def call(x: Tensor, lora: Any, outlier: float | None) -> schedule.Linears:
        weight = Int8ComputeWeight(*q, outlier, backward_in_8_bits=True)
        return schedule.Linears(x, [schedule.Linear(weight, _meta(N, dtype=dtype), lora)])

    for M in (64, 8192):
        x = _meta(sizes.rows(M), K, dtype=dtype)
        for p in (0.0, 0.1):
            step(schedule, call(x, LoRA(A, B, 2.0, p, _SEED), None))
            quantize(x, A, p=p, skip=skip)
        for outlier in (None, 6.0):
            for lora in (None, LoRA(A, B, 2.0)):
                schedule.forward(schedule.TritonPasses(), call(x, lora, outlier))
        step(schedule, call(x, None, None), schedule.Grads(True, [False], [False], [False]))


def _dora(rank: int, dtype: torch.dtype, sizes: Sizes) -> None:
    from peftkit_kernels.ops.dora.passes import magnitude_grad, weight_norm

    N, K = sizes.widths(4096, 4096)
    for weight in (_meta(N, K, dtype=dtype), *_nf4_weights(N, K), _int8_weight(N, K)):
        for factors in dict.fromkeys((dtype, torch.float32)):
            A, B = _meta(rank, K, dtype=factors), _meta(N, rank, dtype=factors)
            weight_norm(weight, A, B, 2.0)
    dy, bias = _meta(sizes.rows(), N, dtype=dtype), _meta(N, dtype=dtype)
    for added in (bias, None):
        magnitude = _meta(N, dtype=torch.float32)
        magnitude_grad(dy, torch.empty_like(dy), added, magnitude, torch.float32)


def _dora_scale(rank: int, dtype: torch.dtype, sizes: Sizes) -> None:
    from peftkit_kernels.ops.dora_scale import passes

    del rank
    M, (N,) = sizes.rows(), sizes.widths(4096)
    z, bias, g = _meta(M, N, dtype=dtype), _meta(N, dtype=dtype), _meta(N, dtype=torch.float32)
    for added in (bias, None):
        passes.scale_forward(z, g, added)
    for kept, needs_bias in ((z, True), (z, False), (None, False)):
        passes.scale_backward(z, kept, g, needs_bias)
    # trained biases need the most registers, and add the same code to every activation
    for act, added in (("silu", None), ("silu", bias), ("gelu", bias), ("gelu_tanh", bias)):
        tensors = z, z, g, g, added, added, act
        passes.gate_forward(*tensors)
        passes.gate_backward(z, *tensors, [True, True, *[added is not None] * 2])


def _lora_decoder_layer(rank: int, dtype: torch.dtype, sizes: Sizes) -> None:
    """The rotation; all other kernels of the op are recorded with the ops of its parts."""
    from peftkit_kernels.ops.lora_decoder_layer.passes import HeadNorms, rotate, rotate_back_

    S = sizes.rows(4096)
    for head_size in (64, 80, 128, 256) if sizes.odd_widths else (64, 128):
        q, k = (_meta(2, S, heads * head_size, dtype=dtype) for heads in (32, 8))
        cos = _meta(1, S, head_size, dtype=dtype)
        weight = _meta(head_size, dtype=dtype)
        for norms in (
            None,
            *(HeadNorms(weight, weight, 1e-6, *n) for n in ((0.0, True), (1.0, False))),
        ):
            rotate(q, k, cos, cos, norms)
            rotate_back_(q, k, cos, cos, *(() if norms is None else (q, k, norms)))


OPS: dict[str, Callable[..., Any]] = {
    "lora_linear": _lora_linear,
    "lora_qkv": _lora_qkv,
    "lora_swiglu_mlp": _lora_swiglu_mlp,
    "lora_decoder_layer": _lora_decoder_layer,
    "bottleneck": _bottleneck,
    "frozen_norm": _frozen_norm,
    "linear_cross_entropy": _linear_cross_entropy,
    "nf4": _nf4,
    "int8": _int8,
    "fp8": _fp8,
    "quantized_linear": _quantized_linear,
    "grouped_lora": _grouped_lora,
    "prefix_attention": _prefix_attention,
    "int8_compute_linear": _int8_compute_linear,
    "dora": _dora,
    "dora_scale": _dora_scale,
}
"""Ops with Triton kernels."""

MIXED_OPS = frozenset(
    """lora_linear lora_qkv lora_swiglu_mlp linear_cross_entropy quantized_linear grouped_lora int8_compute_linear""".split()
)
"""Ops that compile other kernels if their adapters are float32 and activations 16-bit. ``_dora`` records both cases itself."""
