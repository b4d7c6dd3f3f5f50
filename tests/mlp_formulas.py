"""Gated MLPs with the known formula in several styles, and activations."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

WIDTH, SIZE = 16, 24
NAMES = ("gate_proj", "up_proj", "down_proj")
JOINT = ("gate_up_proj", "down_proj")


class MLP(nn.Module):
    """A gated MLP. Subclasses change the forward or add settings."""

    def __init__(self, act: object = None, **settings: object):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, SIZE), nn.Linear(WIDTH, SIZE, bias=False)
        self.down_proj = nn.Linear(SIZE, WIDTH)
        self.act_fn = nn.SiLU() if act is None else act
        self.intermediate_size = SIZE
        for name, value in settings.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The forward of Llama's MLP."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class JointMLP(MLP):
    """A gated MLP with one projection for gate and up."""

    def __init__(self, act: object = None, **settings: object):
        super().__init__(act, **settings)
        del self.gate_proj, self.up_proj
        self.gate_up_proj = nn.Linear(WIDTH, 2 * SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The forward of Phi-3's MLP."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.act_fn(gate))


def mlp(forward: object, act: object = None, base: type = MLP, **settings: object) -> MLP:
    """A gated MLP with another forward."""
    return type("PlantedMLP", (base,), {"forward": forward})(act, **settings)


def names_of(module: nn.Module) -> tuple[str, ...]:
    """The names of its linears."""
    return JOINT if isinstance(module, JointMLP) else NAMES


# The formula in several styles.


def up_first(self, x):
    up = self.up_proj(x)
    return self.down_proj(up * self.act_fn(self.gate_proj(x)))


def in_steps(self, x):
    gate = self.gate_proj(x)
    hidden = torch.mul(self.act_fn(gate), self.up_proj(x))
    return self.down_proj(hidden)


def functional(self, x):
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def multiplied_by_one(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x) * self.scale) * self.up_proj(x)) * 1.0


def no_dropout(self, x):
    return self.down_proj(F.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x), 0.0))


def optional_residual(self, x, residual=None):
    y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return y if residual is None else y + residual


def split(self, x):
    gate, up = self.gate_up_proj(x).split(self.intermediate_size, dim=-1)
    return self.down_proj(self.act_fn(gate) * up)


def split_by_sizes(self, x):
    size = self.intermediate_size
    gate, up = torch.split(self.gate_up_proj(x), [size, size], dim=-1)
    return self.down_proj(self.act_fn(gate) * up)


def slices(self, x):
    both, size = self.gate_up_proj(x), self.intermediate_size
    return self.down_proj(self.act_fn(both[..., :size]) * both[..., size:])


STYLES = {
    **{f.__name__: mlp(f) for f in (MLP.forward, up_first, in_steps, functional)},
    "multiplied_by_one": mlp(multiplied_by_one, scale=1.0),
    "no_dropout": mlp(no_dropout),
    "optional_residual": mlp(optional_residual),
    "chunk": JointMLP(),
    **{f.__name__: mlp(f, base=JointMLP) for f in (split, split_by_sizes, slices)},
}
"""Modules with the known formula and SiLU."""

ACTIVATIONS = {
    "silu": [nn.SiLU(), F.silu, ACT2FN["silu"], ACT2FN["swish"]],
    "gelu": [nn.GELU(), F.gelu, ACT2FN["gelu"]],
    "gelu_tanh": [
        nn.GELU("tanh"),
        functools.partial(F.gelu, approximate="tanh"),
        ACT2FN["gelu_pytorch_tanh"],
    ],
}
"""Activations by the name of their fused form."""

OTHER_ACTIVATIONS = {
    **{type(a).__name__: a for a in (nn.ReLU(), nn.Tanh(), nn.Softplus(), nn.Mish(), nn.ELU())},
    **{type(a).__name__: a for a in (nn.Sigmoid(), nn.Hardswish(), nn.LeakyReLU(1e-3), nn.CELU())},
    **{name: ACT2FN[name] for name in ACT2FN if name not in ("silu", "swish", "gelu")},
    "silu in place": nn.SiLU(inplace=True),
    "learnt": nn.PReLU(),
}
del OTHER_ACTIVATIONS["gelu_pytorch_tanh"]
"""Activations without a fused form. Some compute a known activation in several steps, each with a rounding."""
