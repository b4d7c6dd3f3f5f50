"""Inputs for the bottleneck, its results by name, and the constants for error bounds of its activations."""

import torch
from lora_cases import Shape, gradients
from op_cases import bottleneck_leaves

from peftkit_kernels.ops.bottleneck import ACTIVATIONS, bottleneck

SCALE = -0.7
TRAINED = ("x", "down", "bias_down", "up", "bias_up")

BOUNDED = {
    # largest |act'| and |act''|, and the size of the terms that are summed for the result
    "relu": (1.0, 0.0, lambda v: v.abs()),
    "identity": (1.0, 0.0, lambda v: v.abs()),
    "tanh": (1.0, 0.77, lambda v: 1 + v.abs()),
    "silu": (1.1, 0.5, lambda v: 1 + v.abs()),
    "gelu": (1.13, 0.8, lambda v: 1 + v.abs()),
    "gelu_tanh": (1.13, 0.8, lambda v: 1 + v.abs() * (1 + 0.15 * v.square())),
}
EVALUATION_ULPS = 8.0


def make(bias=True, base=False, **options):
    """The tensors by name. ``base`` adds a tensor to which the adapter's output is added."""
    case = Shape(scale=SCALE, **options)
    leaves = bottleneck_leaves(case)
    if not bias:
        leaves["bias_down"] = leaves["bias_up"] = None
    if base:
        leaves["base"] = case.input()
    return leaves


def apply(leaves, act="gelu", scale=SCALE, **options):
    parts = (leaves[name] for name in TRAINED)
    return bottleneck(*parts, scale, act, leaves.get("base"), **options)


def run(leaves, dy, **options):
    y = apply(leaves, **options)
    present = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    return {"y": y.detach()} | (gradients(y, dy, present) if y.requires_grad else {})


def derivative(z, act):
    leaf = z.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(ACTIVATIONS[act](leaf).sum(), leaf)[0]
