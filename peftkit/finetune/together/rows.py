"""Rows of a joint batch: arguments of several trainings as one batch, and outputs divided again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit.errors import ContractError

_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
_ONE_FOR_ALL = ("cache_position",)
"""Arguments without rows."""

_PER_IMAGE = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")
"""Arguments whose first axis may be images or their parts instead of rows; those of later trainings follow those of earlier ones."""

Call = tuple[tuple[Any, ...], dict[str, Any]]


def batch_rows(call: Call, what: str) -> int:
    """The number of rows of a call of a model.

    Raises:
        ContractError: It has no tensor.
    """
    args, kwargs = call
    for value in (*(kwargs.get(name) for name in _TOKENS), *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim:
            return value.shape[0]
    raise ContractError(f"{what} is called without a tensor, so its rows cannot be found")


def stacked(calls: Sequence[Call], rows: Sequence[int], what: str) -> Call:
    """The arguments of several calls as those of one, row under row. Shorter rows of tokens are padded on the right.

    Args:
        calls: Positional and keyword arguments of each call.
        rows: Number of rows of each.
        what: The class that is called, for messages.

    Raises:
        ContractError: An argument cannot be put together.
    """
    if len({(len(args), tuple(sorted(kwargs))) for args, kwargs in calls}) > 1:
        raise ContractError(
            f"{what} is called with other arguments for one adapter than for another; train them separately"
        )
    args = tuple(
        _together([call[0][i] for call in calls], rows, f"argument {i + 1} of {what}")
        for i in range(len(calls[0][0]))
    )
    kwargs = {
        name: _together([call[1][name] for call in calls], rows, f"{name} of {what}", name)
        for name in calls[0][1]
    }
    return args, kwargs


def _together(values: list[Any], rows: Sequence[int], what: str, name: str = "") -> Any:
    first = values[0]
    if all(isinstance(value, Tensor) for value in values):
        return _tensors(values, rows, what, name)
    if any(isinstance(value, Tensor) for value in values):
        raise ContractError(
            f"{what} is a tensor for one adapter and none for another; train them separately"
        )
    if all(type(value) is type(first) for value in values):
        if isinstance(first, (list, tuple)) and len({len(value) for value in values}) == 1:
            return type(first)(
                _together(list(parts), rows, what) for parts in zip(*values, strict=True)
            )
        plain = first is None or isinstance(first, (bool, int, float, str))
        if plain and all(value == first for value in values):
            return first
    if all(value is first for value in values):
        return first
    raise ContractError(
        f"{what} is a {type(first).__name__} that differs between the adapters and has no rows; train them separately"
    )


def _tensors(values: list[Tensor], rows: Sequence[int], what: str, name: str) -> Tensor:
    by_row = all(v.ndim and v.shape[0] == n for v, n in zip(values, rows, strict=True))
    if name in _ONE_FOR_ALL or not (by_row or name in _PER_IMAGE):
        if all(v.shape == values[0].shape and torch.equal(v, values[0]) for v in values):
            return values[0]
        raise ContractError(
            f"{what} has the shapes {[tuple(v.shape) for v in values]} for batches of {list(rows)} rows, so it cannot be divided among the "
            "adapters; train them separately"
        )
    if len({v.shape[1:] for v in values}) > 1:
        values = _padded(values, what)
    return torch.cat(values)


def _padded(values: list[Tensor], what: str) -> list[Tensor]:
    """Pad the second axis with zeros: token 0 behind the text, with a mask of 0."""
    longest = max(v.shape[1] for v in values)
    if len({v.shape[2:] for v in values}) > 1:
        raise ContractError(
            f"{what} has the shapes {[tuple(v.shape) for v in values]}, of which more than the length differs; train them separately"
        )
    return [F.pad(v, (0, 0) * (v.ndim - 2) + (0, longest - v.shape[1])) for v in values]


def divided(
    outputs: Any, rows: Sequence[int], lengths: Sequence[int | None], what: str
) -> list[Any]:
    """The outputs of a joint batch for each training.

    Args:
        outputs: A tensor, or tensors in tuples and outputs of transformers.
        rows: Number of rows of each training.
        lengths: Number of tokens of each training if its rows were padded further, else ``None``.
        what: The class that was called, for messages.

    Raises:
        ContractError: A tensor does not have the rows of the batch.
    """
    if outputs is None or isinstance(outputs, (bool, int, float, str)):
        return [outputs] * len(rows)
    if isinstance(outputs, Tensor):
        total = sum(rows)
        if not outputs.ndim or outputs.shape[0] % total:
            raise ContractError(
                f"an output of {what} has the shape {tuple(outputs.shape)}, which cannot be divided among {total} rows; train the adapters "
                "separately"
            )
        factor = outputs.shape[0] // total
        parts = outputs.split([factor * n for n in rows])
        # The length is the second of three axes in the hidden states; other outputs do not have it there.
        return [
            part[:, :length] if length is not None and part.ndim == 3 else part
            for part, length in zip(parts, lengths, strict=True)
        ]
    if isinstance(outputs, Mapping):
        columns = {name: divided(value, rows, lengths, what) for name, value in outputs.items()}
        cls: Any = type(outputs)
        return [
            cls(**{name: parts[index] for name, parts in columns.items()})
            for index in range(len(rows))
        ]
    if isinstance(outputs, (list, tuple)):
        parts = [divided(value, rows, lengths, what) for value in outputs]
        return [type(outputs)(part[index] for part in parts) for index in range(len(rows))]
    raise ContractError(
        f"{what} returns a {type(outputs).__name__}, which cannot be divided among adapters; train them separately"
    )
