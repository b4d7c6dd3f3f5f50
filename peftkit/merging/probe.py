"""The batches on which a merged model is compared with the adapted one, and the outputs that are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.checks.batches import checked_batch
from peftkit.errors import ContractError, short

Probe = Mapping[str, Any] | Tensor | Sequence[str] | None

_ROWS, _LENGTH = 8, 64
_MAX_TEXT_LENGTH = 512
_TARGETS = (
    "labels",
    "label",
    "label_ids",
    "start_positions",
    "end_positions",
    "num_items_in_batch",
)


@dataclass(frozen=True)
class Batch:
    """Inputs of a model.

    Attributes:
        inputs: Tensors by argument name, on the device of the model.
        source: Where the inputs are from, for the certificate.
    """

    inputs: dict[str, Any]
    source: str

    def calibrates(self) -> Tensor:
        """``Bool[rows]``: whether a row is for the rounding (even rows) and not for the measurement. A single row is for both."""
        return torch.arange(self.rows()) % 2 == 0

    def calibration(self, x: Tensor) -> Tensor:
        """Select the inputs ``[tokens, K]`` of a layer that are for the rounding.

        Args:
            x: ``[rows, ..., K]`` or ``[rows · positions, K]``. With another shape (experts) all of them are returned.
        """
        rows, mask = self.rows(), self.inputs.get("attention_mask")
        if x.ndim == 2 and rows and x.shape[0] != rows and x.shape[0] % rows == 0:
            x = x.view(rows, -1, x.shape[-1])
        if x.ndim < 3 or x.shape[0] != rows:
            return x.reshape(-1, x.shape[-1])
        chosen = self.calibrates().to(x.device)
        if isinstance(mask, Tensor) and mask.shape == x.shape[:2]:
            return x[(mask != 0) & chosen[:, None]]
        return x[chosen].reshape(-1, x.shape[-1])

    def measured(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """``measured_rows`` of each output."""
        return {name: self.measured_rows(value) for name, value in outputs.items()}

    def measured_rows(self, value: Tensor) -> Tensor:
        """Select the rows that are not for the rounding. With a single row, or another shape, return everything."""
        rows = self.rows()
        if rows < 2 or not value.ndim:
            return value
        if value.ndim == 2 and value.shape[0] != rows and value.shape[0] % rows == 0:
            value = value.view(rows, -1, value.shape[-1])
        return value[~self.calibrates().to(value.device)] if value.shape[0] == rows else value

    def rows(self) -> int:
        """The size of the first dimension."""
        tensors = [v for v in self.inputs.values() if isinstance(v, Tensor) and v.ndim]
        return tensors[0].shape[0] if tensors else 0


def make_batch(base: Any, probe: Probe, tokenizer: Any, *, name: str, seed: int) -> Batch:
    """Turn the user's probe into inputs, or make random token ids.

    Args:
        base: The transformers model.
        probe: A dictionary of tensors, a tensor for the model's main input, texts, or ``None``.
        tokenizer: Needed for texts.
        name: The argument's name, for errors.
        seed: For random token ids.

    Raises:
        ContractError: The batch is unusable, or the model's main input is not token ids and no batch was given.
    """
    main = getattr(base, "main_input_name", "input_ids")
    if probe is None:
        inputs, source = _default(base, main, name, seed)
    elif isinstance(probe, Tensor):
        inputs, source = checked_batch({main: probe}), f"the tensor {name}"
    elif isinstance(probe, str) or (
        isinstance(probe, Sequence) and all(isinstance(text, str) for text in probe)
    ):
        texts = [probe] if isinstance(probe, str) else list(probe)
        inputs, source = _tokenize(texts, tokenizer, name), f"{len(texts)} texts of {name}"
    else:
        inputs, source = checked_batch(probe), f"the batch {name}"
    kept = {key: value for key, value in inputs.items() if key not in _TARGETS}
    if getattr(base.config, "is_encoder_decoder", False) and main == "input_ids":
        kept.setdefault("decoder_input_ids", kept.get("input_ids"))
    device = base.device
    return Batch({k: v.to(device) if isinstance(v, Tensor) else v for k, v in kept.items()}, source)


def _default(base: Any, main: str, name: str, seed: int) -> tuple[dict[str, Tensor], str]:
    if main != "input_ids":
        raise ContractError(
            f"{name}=None, but the main input of {type(base).__name__} is {main}, for which no inputs can be made up; pass "
            f"{name}={{{main!r}: ...}} with a few of your inputs (or certificate=False)"
        )
    config = base.config.get_text_config()
    rows = base.get_input_embeddings().weight.shape[0]
    vocabulary = min(getattr(config, "vocab_size", rows) or rows, rows)
    length = min(_LENGTH, (getattr(config, "max_position_embeddings", None) or _LENGTH) - 4)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (_ROWS, max(2, length)), generator=generator)
    return {"input_ids": ids}, f"{_ROWS} x {ids.shape[1]} random token ids (seed {seed})"


def _tokenize(texts: list[str], tokenizer: Any, name: str) -> dict[str, Tensor]:
    if not texts or not any(text.strip() for text in texts):
        raise ContractError(f"{name}={short(texts)} has no text")
    if not callable(tokenizer):
        raise ContractError(
            f"{name} consists of texts; pass tokenizer= too, or pass a batch of tensors"
        )
    if getattr(tokenizer, "pad_token", None) is None and len(texts) > 1:
        # one by one would need no padding, but a batch does; the mask hides it
        tokenizer = _with_padding(tokenizer)
    found = tokenizer(
        texts,
        return_tensors="pt",
        padding=len(texts) > 1,
        truncation=True,
        max_length=_MAX_TEXT_LENGTH,
    )
    return checked_batch(found)


def _with_padding(tokenizer: Any) -> Any:
    import copy

    padded = copy.deepcopy(tokenizer)
    padded.pad_token = padded.eos_token or padded.unk_token
    return padded


def outputs_of(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Run a model and return its outputs in float32 by name: the logits, or all tensors if it has none.

    Values at padded positions are set to zero.
    """
    found = model(**batch.inputs)
    if not isinstance(found, Mapping):
        found = {"output": found[0] if isinstance(found, tuple) else found}
    tensors = {
        name: value
        for name, value in found.items()
        if isinstance(value, Tensor) and value.is_floating_point() and "loss" not in name
    }
    logits = {name: value for name, value in tensors.items() if name.endswith("logits")}
    mask = batch.inputs.get("attention_mask")
    if "decoder_input_ids" in batch.inputs:
        mask = batch.inputs.get("decoder_attention_mask")
    return {name: _masked(value.float(), mask) for name, value in (logits or tensors).items()}


def _masked(value: Tensor, mask: Any) -> Tensor:
    if not isinstance(mask, Tensor) or mask.ndim != 2 or value.shape[:2] != mask.shape:
        return value
    return value.masked_fill((mask == 0).view(*mask.shape, *[1] * (value.ndim - 2)), 0.0)
