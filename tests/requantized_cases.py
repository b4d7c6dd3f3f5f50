"""Weights that are merged and quantised again, and what they give in plain autograd."""

import torch
from torch.nn import functional as F

from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.lora_qkv import lora_qkv
from peftkit_kernels.ops.lora_swiglu_mlp import lora_swiglu_mlp
from peftkit_kernels.storage.int8 import quantize_int8
from peftkit_kernels.storage.nf4 import quantize_nf4
from peftkit_kernels.storage.quantized import dequantize_reference
from peftkit_kernels.storage.requantized import RequantizedWeight

BASES = {
    "nf4": ("nf4", lambda w: quantize_nf4(w)),
    "nf4, nested": ("nf4", lambda w: quantize_nf4(w, nested=True)),
    "nf4, blocks of 32": ("nf4", lambda w: quantize_nf4(w, 32)),
    "int8": ("int8", quantize_int8),
    "float32 to nf4": ("nf4", lambda w: w),
    "float32 to int8": ("int8", lambda w: w),
    "bfloat16 to nf4": ("nf4", lambda w: w.bfloat16()),
    "float16 to int8": ("int8", lambda w: w.half()),
    "strided float32 to nf4": ("nf4", lambda w: w.t().contiguous().t()),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(name, size=0.03, N=24, K=256, R=5, scale=0.7, dtype=torch.float32):
    into, store = BASES[name]
    lora = LoRA(
        (draw(R, K, seed=1) / K**0.5).to(dtype), (draw(N, R, seed=2) * size).to(dtype), scale
    )
    return RequantizedWeight.merging(store(draw(N, K)), lora, into), lora


def straight_through(q, lora):
    """The weight in plain autograd: Q's values, and the gradients of ``W + scale · B A``."""
    update = lora.B @ lora.A * lora.scale
    return dequantize_reference(q, torch.float32) + (update - update.detach())


def joined(op, merged, seed=0):
    """Three linears with adapters in one op: a function that runs it on a backend, and its results by plain autograd.

    Args:
        op: ``"qkv"`` or ``"mlp"``.
        merged: The linears whose weight contains the update.
        seed: Of all values but the shapes.
    """
    shapes = [(128, 64), (128, 64), (64, 128)] if op == "mlp" else [(128, 64)] * 3
    loras, weights, plain = [], [], []
    for i, (N, K) in enumerate(shapes):
        A, B = draw(3 + i, K, seed=seed + i) / 8, draw(N, 3 + i, seed=seed + 10 + i) / 2
        lora = LoRA(A.requires_grad_(), B.requires_grad_(), 0.5)
        base = quantize_nf4(draw(N, K, seed=seed + 20 + i) / 8, nested=i == 1)
        q = RequantizedWeight.merging(base, lora, "nf4")
        loras.append(lora)
        weights.append(q if i in merged else base)
        whole = dequantize_reference(base, torch.float32) + lora.B @ lora.A * lora.scale
        plain.append(straight_through(q, lora) if i in merged else whole)
    x = draw(1, 40, 64, seed=seed + 30).requires_grad_()
    leaves = [x, *(t for lora in loras for t in (lora.A, lora.B))]

    def with_gradients(ys):
        return [*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), leaves)]

    def run(backend):
        if op == "mlp":
            return with_gradients([lora_swiglu_mlp(x, weights, [None] * 3, loras, backend=backend)])
        return with_gradients(lora_qkv(x, weights, [None] * 3, loras, backend=backend))

    if op == "mlp":
        gate, up, down = plain
        ys = [F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)]
    else:
        ys = [F.linear(x, weight) for weight in plain]
    return run, with_gradients(ys)
