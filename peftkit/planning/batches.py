"""A batch of given sizes for a model, from its class and config."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor

from peftkit.errors import ContractError
from peftkit.find.points import has_image_size, probe_inputs

_IMAGE = 224
"""Pixels of a side of an image if the config does not say: that to which nearly all image processors scale."""


def batch_of(model: Any, batch_size: int, seq_len: int) -> dict[str, Any]:
    """The inputs and labels of a training step, without padding.

    Args:
        model: A transformers model.
        batch_size: Rows.
        seq_len: Tokens of a text (also of the target text of a sequence-to-sequence model), or samples of a sound. Images and
            spectrograms have the size that the config says, or images 224 x 224 pixels if it says none.

    Raises:
        ContractError: Inputs for the model cannot be made, or the model computes no loss from labels.
    """
    try:
        probe = probe_inputs(model)
    except ValueError as error:
        raise ContractError(f"a batch cannot be made: {error}; pass batch=") from error
    parameters = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {}
    for name, tensor in probe.items():
        if name == "pixel_values" and not has_image_size(model.config):
            tensor = tensor.new_zeros(*tensor.shape[:2], _IMAGE, _IMAGE)
        is_sequence = name == "input_ids" or (name == "input_values" and tensor.dim() == 2)
        shape = (batch_size, seq_len) if is_sequence else (batch_size, *tensor.shape[1:])
        inputs[name] = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        if name == "input_ids":
            inputs[name][:, -1] = tensor[0, -1]  # the end of the text, where some heads read
    if probe.pop("decoder_input_ids", None) is not None:
        del inputs["decoder_input_ids"]  # made from the labels
    labels = _labels(model, parameters, inputs, batch_size, seq_len)
    return inputs | labels


def _labels(
    model: Any, parameters: Any, inputs: dict[str, Tensor], batch_size: int, seq_len: int
) -> dict[str, Any]:
    name = type(model).__name__
    if "return_loss" in parameters:  # contrastive models
        return {"return_loss": True}
    device = next(iter(inputs.values())).device

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=device)

    if {"start_positions", "end_positions"} <= parameters.keys():  # answers in a text
        return {"start_positions": zeros(batch_size), "end_positions": zeros(batch_size)}
    if "labels" not in parameters:
        raise ContractError(
            f"{name} computes no loss from labels, so it has no training step; pass a class with a head, such as "
            "AutoModelForCausalLM, as auto_class"
        )
    if name.endswith("ForSemanticSegmentation"):
        return {"labels": zeros(batch_size, *inputs["pixel_values"].shape[2:])}
    if re.search(r"For\w*Classification$", name) and not name.endswith("TokenClassification"):
        return {"labels": zeros(batch_size)}
    if "decoder_input_values" in inputs:  # a spectrogram, of which steps are predicted together
        frames = -(-seq_len // model.config.reduction_factor) * model.config.reduction_factor
        spectrogram = inputs.pop("decoder_input_values")  # made from the labels
        labels = spectrogram.new_zeros(batch_size, frames, spectrogram.shape[2])
        return {"labels": labels, "attention_mask": torch.ones_like(inputs["input_ids"])}
    if "input_ids" not in inputs and "input_features" not in inputs:
        seq_len = min(seq_len, 64)  # speech: characters of a short text
    elif "input_features" in inputs:
        seq_len = min(seq_len, getattr(model.config, "max_target_positions", seq_len))
    return {"labels": zeros(batch_size, seq_len)}
