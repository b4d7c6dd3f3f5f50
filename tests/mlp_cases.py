"""Inputs for the gated MLP, and its results by name."""

import torch
from lora_cases import Shape, draw, gradients

from peftkit_kernels.ops.lora_swiglu_mlp import lora_swiglu_mlp

INNER = 21
LINEARS = ("_gate", "_up", "_down")
NAMES = tuple(name + linear for linear in LINEARS for name in ("bias", "A", "B"))


def make(p=(0.0, 0.0, 0.0), adapted=LINEARS, biased=LINEARS, inner=INNER, **options):
    """``x`` and the three projections of a case. Options are those of ``Shape``."""
    case = Shape(**({"x": (17, 33)} | options))
    x, K = case.input(), case.x[-1]
    rank, parts = case.rank, []
    for linear, rate, size in zip(LINEARS, p, ((inner, K), (inner, K), (K, inner)), strict=True):
        case.p, case.bias, case.rank = rate, linear in biased, rank if linear in adapted else 0
        parts.append(case.projection(*size, linear))
    return x, parts


def named(x, parts):
    """``x`` and the parameters by name."""
    leaves = {"x": x}
    for part, linear in zip(parts, LINEARS, strict=True):
        leaves |= {name + linear: tensor for name, tensor in part.tensors().items()}
    return leaves


def tensors(parts):
    """Weights, biases and adapters in the form that the op takes."""
    return zip(*((part.weight, part.bias, part.lora) for part in parts), strict=True)


def output_grad(x, layout="contiguous"):
    """A gradient for the output."""
    return draw(tuple(x.shape), x.dtype, torch.Generator().manual_seed(1), layout)


def run(x, parts, dy, act="silu", **options):
    """The output and every gradient by name."""
    y = lora_swiglu_mlp(x, *tensors(parts), act, **options)
    return {"y": y.detach(), **gradients(y, dy, named(x, parts))}
