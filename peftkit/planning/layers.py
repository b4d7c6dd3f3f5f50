"""Equal layers: a model with few of them tells the memory of one with many."""

from __future__ import annotations

import copy
from typing import Any

_COUNT = "num_hidden_layers"


def period_of(config: Any) -> int:
    """After how many layers the kinds of layers of a decoder repeat; 0 if they do not, or the model is no plain stack of layers."""
    count = getattr(config, _COUNT, None)
    nested = [value for value in vars(config).values() if hasattr(value, "model_type")]
    if not isinstance(count, int) or nested or getattr(config, "is_encoder_decoder", False):
        return 0
    lists = _lists(config)
    for period in range(1, count // 3 + 1):
        if all(value[period:] == value[:-period] for value in lists.values()):
            return period if _is_regular(config) else 0
    return 0


def shortened(config: Any, count: int) -> Any:
    """A copy of ``config`` with the first ``count`` layers."""
    short = copy.deepcopy(config)
    for name, value in _lists(config).items():
        setattr(short, name, value[:count])
    setattr(short, _COUNT, count)
    return short


def _lists(config: Any) -> dict[str, list[Any]]:
    """The values of a config that have one entry for each layer."""
    count = getattr(config, _COUNT)
    return {
        name: list(value)
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == count
    }


def _is_regular(config: Any) -> bool:
    """Whether no other value of the config counts layers."""
    names = ("mlp_only_layers", "first_k_dense_replace", "decoder_sparse_step", "max_window_layers")
    odd = [getattr(config, name, None) for name in names]
    return odd[0] in (None, []) and odd[1] in (None, 0) and odd[2] in (None, 1)
