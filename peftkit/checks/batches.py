"""Check that a batch has a usable form, and count its supervised labels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.errors import ContractError, count, short

_IGNORED = -100
_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features", "labels")
# transformers' loss of these models compares the output at one position with the label at the next.
_SHIFTED = re.compile(r"ForCausalLM$|LMHeadModel$|ForConditionalGeneration$")
# The losses of these models ignore no label, or another label than -100.
_OTHER_LOSSES = re.compile(r"ForCTC|Segmentation|ObjectDetection|DepthEstimation|ForPreTraining")


@dataclass(frozen=True)
class Supervision:
    """The number of labels in a batch that the loss uses.

    Attributes:
        supervised: Number of labels that are compared with an output.
        labels: Number of all labels.
        empty_rows: Number of rows of the batch without such a label.
        rows: Number of rows.
        where: How the labels were counted, for messages.
    """

    supervised: int
    labels: int
    empty_rows: int
    rows: int
    where: str

    def __str__(self) -> str:
        """``0 of 24 label positions are supervised after the shift``"""
        return f"{self.supervised} of {count(self.labels, 'label position')} are supervised{self.where}"


def checked_batch(batch: Any) -> dict[str, Any]:
    """Check a batch, and return it as a dictionary.

    Args:
        batch: A mapping from names to tensors, such as a ``BatchEncoding``.

    Raises:
        ContractError: The batch is not a mapping, has no rows or tokens, or masks out every token.
    """
    if hasattr(batch, "__next__") or type(batch).__name__.endswith("DataLoader"):
        raise ContractError(
            f"batch is a {type(batch).__name__}; pass one batch of it: next(iter(loader))"
        )
    if isinstance(batch, (list, tuple)):
        raise ContractError(
            f"batch is a {type(batch).__name__} of {count(len(batch), 'item')}; pass a dictionary of the tensors that the "
            "model gets: apply the data collator first, for example default_data_collator(examples)"
        )
    if not isinstance(batch, Mapping):
        raise ContractError(
            f"batch={short(batch)} is of type {type(batch).__name__}; pass a dictionary of tensors, such as input_ids, "
            "attention_mask and labels"
        )
    if not batch:
        raise ContractError(
            "batch is empty; pass input_ids, labels and the other inputs of the model"
        )
    for name, value in batch.items():
        _check_value(str(name), value)
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.any()):
        raise ContractError(
            "attention_mask masks out every token of the batch; it is 1 for tokens and 0 for padding"
        )
    return dict(batch)


def _check_value(name: str, value: Any) -> None:
    if type(value).__module__ == "numpy":
        raise ContractError(
            f"batch[{name!r}] is a numpy {type(value).__name__}; convert it with torch.from_numpy, or let the tokenizer and "
            'the collator return tensors (return_tensors="pt")'
        )
    if isinstance(value, (list, tuple)) and _holds_numbers(value):
        raise ContractError(
            f"batch[{name!r}] is a {type(value).__name__} of numbers; convert it with torch.tensor, or let the tokenizer and "
            'the collator return tensors (return_tensors="pt")'
        )
    if name in _INPUTS and isinstance(value, Tensor) and value.numel() == 0:
        what = "rows" if value.ndim == 0 or value.shape[0] == 0 else "tokens"
        raise ContractError(
            f"the batch has no {what}: batch[{name!r}] has the shape {list(value.shape)}; check the sampler and the filters of "
            "the data set"
        )


def _holds_numbers(value: Any) -> bool:
    while isinstance(value, (list, tuple)):
        if not value:
            return True
        value = value[0]
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def supervision(model: nn.Module, batch: Mapping[str, Any]) -> Supervision | None:
    """Count the labels that the loss of a transformers model uses.

    Args:
        model: A model with or without adapters.
        batch: A batch from ``checked_batch``.

    Returns:
        The counts, or ``None`` if the labels are not classes or the model has another kind of loss (CTC, detection,
        regression).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = [cls.__name__ for cls in type(base).__mro__]
    config = getattr(base, "config", None)
    if config is None or any(map(_OTHER_LOSSES.search, names)) or _is_regression(config, names):
        return None
    if isinstance(batch.get("start_positions"), Tensor):
        return _of_spans(batch)
    given = {name for name in batch if "label" in str(name)}
    labels = batch.get("shift_labels", batch.get("labels"))
    if given - {"labels", "shift_labels"} or not isinstance(labels, Tensor):
        return None
    if labels.is_floating_point() or labels.ndim == 0:
        return None
    where, used = "", labels != _IGNORED
    if "shift_labels" in batch:
        where = " (shift_labels)"
    elif labels.ndim == 2 and _shifts(model, config, names):
        where = " after the shift"
        used = used[:, 1:]
    return _counted(used, labels.numel(), where)


def _counted(used: Tensor, labels: int, where: str) -> Supervision:
    by_row = used.reshape(used.shape[0], -1).sum(1)
    return Supervision(int(by_row.sum()), labels, int((by_row == 0).sum()), used.shape[0], where)


def _of_spans(batch: Mapping[str, Any]) -> Supervision | None:
    """Count the labels of question answering. transformers ignores positions after the end of the sequence."""
    ids, ends = batch.get("input_ids"), [batch["start_positions"], batch.get("end_positions")]
    if not isinstance(ids, Tensor) or not all(isinstance(end, Tensor) for end in ends):
        return None
    used = torch.stack([end.reshape(-1).cpu() < ids.shape[1] for end in ends], 1)
    return _counted(used, used.numel(), " (start_positions and end_positions inside the sequence)")


def _is_regression(config: Any, names: list[str]) -> bool:
    if not any(name.endswith(("SequenceClassification", "ImageClassification")) for name in names):
        return False
    kind = getattr(config, "problem_type", None)
    return kind in ("regression", "multi_label_classification") or (
        kind is None and getattr(config, "num_labels", 2) == 1
    )


def _shifts(model: nn.Module, config: Any, names: list[str]) -> bool:
    if getattr(config, "is_encoder_decoder", False) or not any(map(_SHIFTED.search, names)):
        return False
    # With prompts before the first token, the first label has an output before it.
    active = getattr(model, "active_peft_config", None)
    prompts = active is not None and active.is_prompt_learning
    return not (prompts and active.peft_type != "PREFIX_TUNING")


def require_supervision(batch: Mapping[str, Any], found: Supervision | None) -> list[str]:
    """Raise if the loss of a batch uses no label.

    Args:
        batch: A batch from ``checked_batch``.
        found: The result of ``supervision``.

    Returns:
        Notes on rows without a supervised label.

    Raises:
        ContractError: No label is supervised, or ``num_items_in_batch`` is not positive.
    """
    items = batch.get("num_items_in_batch")
    if items is not None and not bool(torch.as_tensor(items) > 0):
        raise ContractError(
            f"num_items_in_batch={items}, but the loss is divided by this number; leave it out, or pass the number of labels "
            "that are not -100"
        )
    if found is None:
        return []
    if found.supervised == 0:
        raise ContractError(
            f"{found}, so the model cannot learn from this batch; check how the collator masks prompts and padding (labels of "
            f"{_IGNORED} are ignored), and whether truncation removes the answers"
        )
    if found.empty_rows:
        have = "has" if found.empty_rows == 1 else "have"
        return [f"{found.empty_rows} of {count(found.rows, 'row')} {have} no supervised label"]
    return []
