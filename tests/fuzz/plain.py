"""Modules of a few lines, for formulas that no architecture isolates: one linear, q/k/v, gated MLPs and norms, near-misses too."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 64
FAMILIES = ("linear", "qkv", "gated", "normed")


class QKV(nn.Module):
    """Three siblings on one input."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH // 2)
        self.v_proj = nn.Linear(WIDTH, WIDTH // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., WIDTH]``."""
        return self.q_proj(x) * torch.cat([self.k_proj(x), self.v_proj(x)], -1)


class GatedMLP(nn.Module):
    """A gated MLP of one of several formulas.

    Args:
        formula: ``"plain"``; ``"clamp"`` limits the gate at 1; ``"factor"`` multiplies the gate by 0.95 and the output by 0.9;
            ``"swapped"`` activates up; ``"residual"`` adds the input; ``"shifted"`` adds 1 to up, clamped.
    """

    def __init__(self, formula: str):
        super().__init__()
        self.formula = formula
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, 96), nn.Linear(WIDTH, 96)
        self.down_proj = nn.Linear(96, WIDTH, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., WIDTH]``."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.formula == "clamp":
            gate, up = gate.clamp(max=1.0), up.clamp(-1.0, 1.0)
        elif self.formula == "factor":
            gate = gate * 0.95
        elif self.formula == "swapped":
            gate, up = up, gate
        elif self.formula == "shifted":
            up = up.clamp(-7.0, 7.0) + 1
        y = self.down_proj(self.act_fn(gate) * up)
        if self.formula == "residual":
            return x + y
        return y * 0.9 if self.formula == "factor" else y


class FormulaNorm(nn.Module):
    """A norm over the last axis of one of several formulas, with a weight and an eps.

    Args:
        formula: ``"rms"``; ``"offset"`` multiplies by 1 + weight; ``"mean"`` subtracts the mean; ``"outside"`` adds eps to the
            root; ``"late"`` multiplies by the weight in float32; ``"ratio"`` multiplies by 1.004.
    """

    def __init__(self, formula: str):
        super().__init__()
        self.formula, self.eps = formula, 1e-3
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., WIDTH]`` in the dtype of ``x``."""
        wide = x.float()
        if self.formula == "mean":
            wide = wide - wide.mean(-1, keepdim=True)
        square = wide.square().mean(-1, keepdim=True)
        if self.formula == "outside":
            y = wide / (square.sqrt() + self.eps)
        else:
            y = wide * torch.rsqrt(square + self.eps)
        if self.formula == "late":
            return (y * self.weight.float()).to(x.dtype)
        if self.formula == "offset":
            return (y * (1 + self.weight.float())).to(x.dtype)
        return y.to(x.dtype) * self.weight * (1.004 if self.formula == "ratio" else 1.0)


class Normed(nn.Module):
    """A norm and a linear after a linear, whose gradient passes through the norm."""

    def __init__(self, formula: str):
        super().__init__()
        self.first, self.norm = nn.Linear(WIDTH, WIDTH), FormulaNorm(formula)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., WIDTH]``."""
        return self.last(F.silu(self.norm(self.first(x))))


FORMULAS = {
    "gated": ("plain", "clamp", "factor", "swapped", "residual", "shifted"),
    "normed": ("rms", "offset", "mean", "outside", "late", "ratio"),
}


def build(family: str, formula: str | None) -> nn.Module:
    """The module of a name in ``FAMILIES``, with torch's own initial values."""
    if family == "linear":
        return nn.Sequential(nn.Linear(WIDTH, 48))
    if family == "qkv":
        return nn.Sequential(QKV())
    formula = formula or FORMULAS[family][0]
    return nn.Sequential(GatedMLP(formula) if family == "gated" else Normed(formula))
