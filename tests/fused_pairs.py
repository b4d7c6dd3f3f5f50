"""A given module with PEFT's LoRA in float64, and a fused copy."""

import copy

import pairs
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peftkit import accelerate


def adapt(module, targets=None, **config):
    """``module`` in float64 with LoRA on its linears, and a fused copy."""
    module = nn.Sequential(module).double()
    names = targets or [n.split(".")[-1] for n, m in module.named_modules() if type(m) is nn.Linear]
    plain = get_peft_model(module, LoraConfig(r=4, target_modules=names, **config))
    pairs.fill_factors(plain)
    return plain, accelerate(copy.deepcopy(plain))


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)
