"""Bounds of a linear with its adapter, with the roundings of the Triton kernels."""

import torch
from lora_cases import draw
from triton_cases import dropped, scaled

from lab.testing import Bound
from peftkit_kernels.core.dropout import dropout_mask


def output_grad(x, part, layout="contiguous"):
    shape = (*x.shape[:-1], part.weight.shape[0])
    return draw(shape, x.dtype, torch.Generator().manual_seed(1), layout)


def narrow_product(s, factor, dtype, wide):
    """The product of ``s`` and a factor, both in ``wide``, before the rounding to ``dtype``.

    If ``dtype`` has 16 bits, float32 operands are split into bfloat16 halves.
    """
    if dtype.itemsize == 2 and wide is torch.float32:
        s, factor = s.halves(), factor.halves()
    return s @ factor


class Linear:
    """A linear with the kernels' roundings: one at each store, and one of the update if the library's GEMM adds to it."""

    def __init__(self, x, part, schedule):
        self.dtype, self.schedule = x.dtype, schedule
        self.x, self.part, self.lora = x.detach().reshape(-1, x.shape[-1]), part, part.lora
        A, B = self.lora.A, self.lora.B
        self.factors, self.A, self.B = A.dtype, A, B
        self.wide = torch.promote_types(x.dtype, A.dtype)
        dropped_x = dropped(self.x, self.lora.p, self.lora.seed)
        self.dropped = Bound.of(dropped_x)
        s = self.dropped @ Bound.of(self.A).T
        self.s = scaled(s, 1.0, self.lora.p).round(self.wide)

    def narrow_product(self, s, factor):
        """``narrow_product`` in the dtypes of this linear."""
        return narrow_product(s, factor, self.dtype, self.wide)

    def project(self, x, weight, update, bias=None):
        if self.schedule == "fused":
            y = update.addmm(x, weight)
            return (y if bias is None else y + bias).round(self.dtype)
        update = update if bias is None else update + bias
        return update.round(self.dtype).addmm(x, weight).round(self.dtype)

    def forward(self):
        update = scaled(self.narrow_product(self.s, Bound.of(self.B).T), self.lora.scale)
        bias = None if self.part.bias is None else Bound.of(self.part.bias)
        return self.project(Bound.of(self.x), Bound.of(self.part.weight).T, update, bias)

    def backward(self, dy):
        lora, dy = self.lora, Bound.of(dy.reshape(-1, dy.shape[-1]))
        ds = scaled(dy @ Bound.of(self.B), lora.scale).round(self.wide)
        update = scaled(self.narrow_product(ds, Bound.of(self.A)), 1.0, lora.p)
        if lora.p:
            update = update * dropout_mask(*update.value.shape, lora.p, lora.seed)
        return {
            "x": self.project(dy, Bound.of(self.part.weight), update),
            "A": scaled(ds.T @ self.dropped, 1.0, lora.p).round(self.factors),
            "B": scaled(dy.T @ self.s, lora.scale).round(self.factors),
            "bias": dy.sum(0).round(self.dtype),
        }
