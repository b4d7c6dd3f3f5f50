"""Make a random training batch for a model, from its config and class."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor

from peftkit.find.points import probe_inputs

ROWS = 2


def training_batch(model: Any) -> dict[str, Any]:
    """Make two rows of inputs with labels. For text, the second row has padding on the right.

    Args:
        model: A transformers model.

    Returns:
        The arguments of the model's forward by name.

    Raises:
        ValueError: Inputs for the model cannot be made, or the model computes no loss from labels.
    """
    generator = torch.Generator().manual_seed(11)
    parameters = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {}
    for name, tensor in probe_inputs(model).items():
        shape = (ROWS, *tensor.shape[1:])
        if tensor.is_floating_point():
            inputs[name] = torch.randn(shape, generator=generator)
        else:
            vocabulary = model.config.get_text_config().vocab_size
            inputs[name] = torch.randint(3, vocabulary, shape, generator=generator)
    text = inputs.get("input_ids")
    if text is not None and "attention_mask" in parameters:
        mask = torch.ones_like(text)
        mask[1, -2:] = 0
        inputs["attention_mask"] = mask
    inputs |= _labels(model, parameters, inputs)
    inputs.pop("decoder_input_ids", None)  # made from the labels
    return inputs


def _labels(model: Any, parameters: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    name = type(model).__name__
    if "return_loss" in parameters:  # contrastive models
        return {"return_loss": True}
    if "labels" not in parameters:
        raise ValueError(f"{name} computes no loss from labels; use a class with a head")
    if re.search(r"For\w*Classification$", name) and not name.endswith("TokenClassification"):
        return {"labels": torch.arange(ROWS) % model.config.num_labels}
    ids: Tensor | None = inputs.get("input_ids")
    if ids is None:  # speech: a short sequence of characters or words
        ids = torch.tensor([[3, 4], [5, 6]])
    if name.endswith("TokenClassification"):
        ids = ids % model.config.num_labels
    mask = inputs.get("attention_mask")
    hidden = mask is not None and not getattr(model.config, "is_encoder_decoder", False)
    return {"labels": ids.masked_fill(mask == 0, -100) if hidden else ids.clone()}
