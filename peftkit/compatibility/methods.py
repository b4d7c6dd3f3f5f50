"""The methods in the compatibility table, each with settings for a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import IA3Config, LoraConfig
from torch import nn

from peftkit.bridge import BottleneckConfig, PrefixConfig
from peftkit.find.targets import all_linear, base_modules


def _targets(model: nn.Module) -> str | list[str]:
    """Return all linear layers. If the model has none, return all convolutions without groups."""
    if all_linear(model).modules:
        return "all-linear"
    return [
        name
        for name, module in base_modules(model)
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1
    ]


def _lora(model: nn.Module, **fields: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=_targets(model), **fields)


def _gated(model: nn.Module) -> PrefixConfig:
    return PrefixConfig(num_virtual_tokens=3, gate=True, init_std=0.5)


def _bottleneck(placement: str) -> BottleneckConfig:
    # with relu, all four units could be zero for every token; they would then rightly get no gradient
    return BottleneckConfig(bottleneck_size=4, placement=placement, activation="gelu")


METHODS: dict[str, Callable[[nn.Module], list[Any]]] = {
    "LoRA": lambda model: [_lora(model)],
    "rsLoRA": lambda model: [_lora(model, use_rslora=True)],
    "DoRA": lambda model: [_lora(model, use_dora=True)],
    "(IA)³": lambda model: [IA3Config(target_modules=_targets(model), feedforward_modules=[])],
    "prefix": lambda model: [PrefixConfig(num_virtual_tokens=3, init_std=0.5)],
    "gated prefix": lambda model: [_gated(model)],
    "Houlsby": lambda model: [_bottleneck("houlsby")],
    "Pfeiffer": lambda model: [_bottleneck("pfeiffer")],
    "parallel": lambda model: [_bottleneck("parallel")],
    "mix": lambda model: [_lora(model), _gated(model), _bottleneck("houlsby")],
}
"""The configs that ``wrap`` gets for a model, by method. ``mix`` is LoRA, a gated prefix and Houlsby's adapters together."""
