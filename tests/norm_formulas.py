"""Norms with the known formulas in several styles."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 16


class Norm(nn.Module):
    """A norm over the last axis. Subclasses change the forward or add settings."""

    def __init__(
        self, width: int = WIDTH, eps: float = 1e-6, bias: bool = False, **settings: object
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 20.0, width), requires_grad=False)
        self.bias = nn.Parameter(torch.full((width,), 0.25), requires_grad=False) if bias else None
        self.eps = eps
        for name, value in settings.items():
            setattr(self, name, value)

    def _norm(self, h: torch.Tensor) -> torch.Tensor:
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The forward of Llama's norm."""
        return self.weight * self._norm(x.float()).to(x.dtype)


def norm(forward: object, **settings: object) -> Norm:
    """A norm with another forward."""
    return type("PlantedNorm", (Norm,), {"forward": forward})(**settings)


# Llama's formula in several styles: round, then multiply by the weight.


def swapped_product(self, x):
    h = x.to(torch.float32)
    return (torch.rsqrt((h * h).mean(dim=-1, keepdim=True) + self.eps) * h).to(
        x.dtype
    ) * self.weight


def method_calls(self, x):
    dtype = x.dtype
    h = x.float()
    variance = h.square().mean(-1, True).add(self.eps)
    return self.weight.mul(h.mul(variance.rsqrt()).type(dtype))


def division_by_root(self, x):
    h = x.float()
    return self.weight * (h / torch.sqrt(self.eps + h.pow(2).mean(-1, keepdim=True))).to(x.dtype)


def reciprocal_of_root(self, x):
    h = x.float()
    return self.weight * (h * (1.0 / (h.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())).type_as(
        x
    )


def power_of_half(self, x):
    h = x.float()
    return self.weight * (h * (h.pow(2).mean(-1, keepdim=True) + self.eps).pow(-0.5)).to(x.dtype)


def sum_by_width(self, x):
    h = x.float()
    mean = h.pow(2).sum(-1, keepdim=True) / x.shape[-1]
    return self.weight * (h * torch.rsqrt(mean + self.eps)).to(x.dtype)


def promoted(self, x):
    # T5's formula: the product casts x
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    h = x * torch.rsqrt(variance + self.eps)
    if self.weight.dtype in [torch.float16, torch.bfloat16]:
        h = h.to(self.weight.dtype)
    return self.weight * h


def unsqueezed(self, x):
    h = x.float()
    return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1).unsqueeze(-1) + self.eps)).to(x.dtype)


# Gemma's formula: one is added to the weight, and the result is rounded at the end.


def gemma(self, x):
    return (self._norm(x.float()) * (1.0 + self.weight.float())).type_as(x)


def gemma_swapped(self, x):
    return ((self.weight.float() + 1) * self._norm(x.float())).to(x.dtype)


# Rounded at the end, without an offset.


def wide(self, x):
    return (self.weight.float() * self._norm(x.float())).to(x.dtype)


def wide_promoted(self, x):
    return (self.weight * self._norm(x.float())).to(x.dtype)


def torch_rms(self, x):
    return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


# LayerNorm.


def layer(self, x):
    h = x.float()
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    h = (h - mean) * torch.rsqrt(variance + self.eps)
    return (self.weight.float() * h).to(x.dtype)


def layer_by_var(self, x):
    h = x.float()
    variance = h.var(-1, keepdim=True, unbiased=False)
    h = (h - h.mean(-1, keepdim=True)) / torch.sqrt(variance + self.eps)
    return (self.weight.float() * h + self.bias.float()).to(x.dtype)


def torch_layer(self, x):
    return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


def torch_layer_in_float32(self, x):
    weight, bias = self.weight.float(), self.bias.float()
    return F.layer_norm(x.float(), self.weight.shape, weight, bias, self.eps).to(x.dtype)


RMS = {
    (0.0, True): [
        *(Norm.forward, swapped_product, method_calls, division_by_root, reciprocal_of_root),
        *(power_of_half, sum_by_width, promoted, unsqueezed),
    ],
    (1.0, False): [gemma, gemma_swapped],
    (0.0, False): [wide, wide_promoted, torch_rms],
}
"""Forwards by offset, and by whether they round before the product with the weight."""

LAYER = {False: [layer], True: [layer_by_var, torch_layer, torch_layer_in_float32]}
"""Forwards by whether they use a bias."""
