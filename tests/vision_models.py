"""Tiny models for images: convolutional classifiers with batch norms, and what else the image tasks need. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn

LABELS = 3
SIZE = 32


def _resnet() -> nn.Module:
    config = hf.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=LABELS,
    )
    return hf.ResNetForImageClassification(config)


def _efficientnet() -> nn.Module:
    config = hf.EfficientNetConfig(
        width_coefficient=0.25,
        depth_coefficient=0.3,
        image_size=SIZE,
        hidden_dim=320,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
        num_labels=LABELS,
    )
    return hf.EfficientNetForImageClassification(config)


def _mobilenet(tf_padding: bool = True) -> nn.Module:
    config = hf.MobileNetV2Config(
        depth_multiplier=0.25,
        image_size=SIZE,
        tf_padding=tf_padding,
        classifier_dropout_prob=0.0,
        num_labels=LABELS,
    )
    return hf.MobileNetV2ForImageClassification(config)


def _regnet() -> nn.Module:
    config = hf.RegNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24],
        depths=[1, 1, 1],
        groups_width=4,
        num_labels=LABELS,
    )
    return hf.RegNetForImageClassification(config)


def _convnext() -> nn.Module:
    config = hf.ConvNextConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 24, 32],
        drop_path_rate=0.0,
        num_labels=LABELS,
    )
    return hf.ConvNextForImageClassification(config)


BUILDERS = {
    "resnet": _resnet,
    "efficientnet": _efficientnet,
    "mobilenet": _mobilenet,
    "regnet": _regnet,
    "convnext": _convnext,
}
CONVOLUTIONS = {
    "resnet": ["convolution"],
    "efficientnet": ["expand_conv", "project_conv"],
    "mobilenet": ["expand_1x1.convolution", "reduce_1x1.convolution"],
    "regnet": ["0.convolution", "3.convolution"],
    "convnext": ["pwconv1", "pwconv2"],
}
"""Entries of ``target_modules`` for layers that are not depthwise."""


def tiny(name: str, **options: Any) -> Any:
    """Build a tiny model with seeded weights. The statistics of its batch norms are those of images in random colours."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BUILDERS[name](**options)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                # Initial weights near 0.02 would make the signal of a deep model vanish.
                nn.init.kaiming_normal_(module.weight)
        _measure(model)
    return model.train()


def _measure(model: nn.Module) -> None:
    """Set the statistics of batch norms, as training on other images would have done."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        nn.init.ones_(norm.weight)
        norm.momentum = None  # the mean over all batches
    with torch.no_grad():
        for _ in range(4 if norms else 0):
            colours = torch.rand(32, 3, 1, 1) * 2 - 1
            model.train()(pixel_values=colours + 0.1 * torch.randn(32, 3, SIZE, SIZE))
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value


def save(folder: Path, name: str) -> Path:
    """Save the backbone of a tiny model, so that its head is new, with an image processor."""
    tiny(name).base_model.save_pretrained(folder)
    hf.ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder
