"""How bitsandbytes' 8-bit linears are multiplied: as bitsandbytes does on the device, or as the user has chosen."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

from torch import nn

from peftkit.errors import ContractError

Int8Mode = Literal["compute", "weight-only"]
_ATTRIBUTE = "_peftkit_int8_mode"


def set_int8_mode(model: nn.Module, mode: Int8Mode | None) -> None:
    """Choose the mode of every 8-bit linear of the model; ``None`` changes nothing.

    Raises:
        ContractError: The mode is unknown, or the model has no 8-bit linear.
    """
    if mode is None:
        return
    if mode not in get_args(Int8Mode):
        known = ", ".join(map(repr, get_args(Int8Mode)))
        raise ContractError(f"int8_mode={mode!r} is unknown; use one of {known}, or None")
    layers = [module for module in model.modules() if _is_8_bit(module)]
    if not layers:
        raise ContractError(
            f"int8_mode={mode!r}, but the model has no 8-bit linear of bitsandbytes; load it in 8 bits, or leave int8_mode out"
        )
    for layer in layers:
        set_int8_mode_of(layer, mode)


def set_int8_mode_of(base: nn.Module, mode: Int8Mode) -> None:
    """Choose the mode of one 8-bit linear."""
    base.__dict__[_ATTRIBUTE] = mode


def int8_mode_of(base: Any) -> Int8Mode | None:
    """The mode that was chosen for an 8-bit linear, or ``None``."""
    return base.__dict__.get(_ATTRIBUTE)


def forget_int8_mode(module: nn.Module) -> None:
    """Remove the choice from a module."""
    module.__dict__.pop(_ATTRIBUTE, None)


@contextmanager
def outliers_in_8_bits(model: nn.Module) -> Iterator[None]:
    """Quantise outliers as well within this context, so that each row of a batch is computed by itself.

    bitsandbytes multiplies a column of the input in 16 bits if *any* row reaches the threshold in it. So the other rows of a batch change
    what is computed of a row, a little, in any model. A check that no row has an effect on another one would take this for a fault.

    Source: Dettmers et al., 2022, arXiv:2208.07339, section 3.2.
    """
    states: list[Any] = [module.state for module in model.modules() if _is_8_bit(module)]
    thresholds = [state.threshold for state in states]
    for state in states:
        state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in zip(states, thresholds, strict=True):
            state.threshold = threshold


def _is_8_bit(module: nn.Module) -> bool:
    # a model with such layers has imported the library
    library = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(module, library.nn.Linear8bitLt)
