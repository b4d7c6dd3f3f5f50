"""Inputs for the frozen norms, and the bounds of their results."""

import torch
from lora_cases import draw

from lab.testing import Bound
from peftkit_kernels.ops.frozen_norm import frozen_layer_norm, frozen_rms_norm

EPS = 1e-5
RSQRT_ULPS = 2.0
"""Largest error of the GPU's approximation (CUDA C++ Programming Guide, table of intrinsic functions). A division by a root has a
smaller error."""
RMS = {"llama": (0.0, True), "gemma": (1.0, False), "both": (1.0, True)}
"""Offset, and whether the normalised value is rounded before the product with the weight."""
KINDS = (*RMS, "layer", "layer_no_bias")


def make(shape=(17, 33), dtype=torch.float32, layout="contiguous", weight_dtype=None):
    """``x``, weight, bias and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    x = draw(shape, dtype, generator, layout).requires_grad_()
    weight, bias = (draw(shape[-1:], weight_dtype or dtype, generator) for _ in range(2))
    return x, weight, bias, draw(shape, dtype, generator, layout)


def apply(kind, x, weight, bias, **options):
    """Apply the norm ``kind``, one of ``KINDS``. Options are those of the ops."""
    if kind in RMS:
        offset, round_first = RMS[kind]
        return frozen_rms_norm(x, weight, EPS, offset=offset, round_first=round_first, **options)
    return frozen_layer_norm(x, weight, bias if kind == "layer" else None, EPS, **options)


def bounds(kind, x, weight, bias, dy):
    """Bounds on the output and the input gradient, with the roundings of the definitions."""
    rows, K, dtype = Bound.of(x.reshape(-1, x.shape[-1])), x.shape[-1], x.dtype
    offset, round_first = RMS.get(kind, (0.0, False))
    centred = rows if kind in RMS else rows - rows.sum(1, keepdim=True) * (1 / K)
    eps = Bound.of(torch.tensor([EPS], dtype=torch.float64))
    if dtype is not torch.float64:
        eps = eps.round(torch.float32)
    square = (centred * centred).sum(1, keepdim=True) * (1 / K)
    square = square + Bound(eps.value, eps.error, rows.unit)
    # the largest derivative of v^(-1/2) within the error
    steepest = 0.5 * (square.value - square.error).pow(-1.5)
    rstd = square.map(torch.rsqrt, steepest, RSQRT_ULPS)
    n = centred * rstd
    factor = Bound.of(weight)
    if offset:
        one = torch.tensor([offset], dtype=torch.float64)
        factor = factor + Bound(one, torch.zeros_like(one), rows.unit)
    y = n.round(dtype) * factor.round(weight.dtype) if round_first else n * factor
    if kind == "layer":
        y = y + Bound.of(bias)

    u = Bound.of(dy.reshape(-1, K)) * factor
    dx = u - n * ((u * n).sum(1, keepdim=True) * (1 / K))
    if kind not in RMS:
        dx = dx - u.sum(1, keepdim=True) * (1 / K)
    out = torch.promote_types(dtype, weight.dtype) if round_first else dtype
    return y.round(out).reshape(*x.shape), (dx * rstd).round(dtype).reshape(*x.shape)
