"""Configs of every method of peftkit and every mix, and tiny models with a new or a seemingly trained adapter."""

import models
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from peftkit import BottleneckConfig, PrefixConfig, wrap


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear")


def houlsby() -> BottleneckConfig:
    return BottleneckConfig(bottleneck_size=4)


def gated() -> PrefixConfig:
    return PrefixConfig(num_virtual_tokens=3, gate=True, init_std=0.5)


METHODS = {
    "LoRA": lambda: [lora()],
    "bottleneck": lambda: [houlsby()],
    "pfeiffer": lambda: [
        BottleneckConfig(bottleneck_size=4, placement="pfeiffer", layer_norm=True)
    ],
    "parallel": lambda: [
        BottleneckConfig(reduction_factor=8, placement="parallel", scaling="learned")
    ],
    "prefix": lambda: [PrefixConfig(num_virtual_tokens=3, init_std=0.5)],
    "gated prefix": lambda: [gated()],
    "prefix and bottleneck": lambda: [gated(), houlsby()],
    "LoRA and parallel": lambda: [
        lora(),
        BottleneckConfig(bottleneck_size=4, placement="parallel"),
    ],
    "all three": lambda: [lora(), gated(), houlsby()],
}


def wrapped(method: str, name: str, **changes) -> PeftModel:
    """Tiny model ``name`` in evaluation mode with a new adapter. It is the same each time."""
    return on(models.tiny(name, **changes).eval(), method)


def on(base: nn.Module, method: str) -> PeftModel:
    """``base`` with a new adapter. It is the same each time."""
    torch.manual_seed(0)
    return wrap(base, *METHODS[method]())


def trained(model: PeftModel) -> PeftModel:
    """Replace every trainable value by a random one, as if the adapter were trained."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.2 * noise)
    return model
