"""Bottleneck adapters: small modules beside a model's own, on the outputs of attention, MLP or layer."""

from peftkit.bottleneck.config import BottleneckConfig
from peftkit.bottleneck.inject import add_bottlenecks, remove_bottlenecks
from peftkit.bottleneck.module import Bottleneck, BottleneckSite

__all__ = [
    "Bottleneck",
    "BottleneckConfig",
    "BottleneckSite",
    "add_bottlenecks",
    "remove_bottlenecks",
]
