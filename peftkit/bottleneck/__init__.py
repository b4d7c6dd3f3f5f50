"""Bottleneck adapters: small trained modules that change the output of an attention, an MLP or a layer."""

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
