"""bitsandbytes' repacking of 4-bit weights, which changes a model that is evaluated between two steps of training.

On processors with AVX512-BF16, ``Linear4bit`` repacks its weight in place at the first call in evaluation mode: the block maxima are rounded to
bfloat16, nested maxima are decoded, and in the training that follows the layer passes no gradient on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_REPACKS = "support_avx512bf16_for_cpu"
_FORBIDDEN = "_peftkit_keeps_layout"


def forbid_repacking(model: nn.Module) -> None:
    """Let the 4-bit linears of a model keep their weights as they are stored, in evaluation too; until ``allow_repacking``."""
    for module in model.modules():
        state = module.__dict__
        if state.get(_REPACKS):
            state[_REPACKS], state[_FORBIDDEN] = False, True


def allow_repacking(module: nn.Module) -> None:
    """Undo ``forbid_repacking`` for one module."""
    if module.__dict__.pop(_FORBIDDEN, False):
        module.__dict__[_REPACKS] = True


@contextmanager
def without_repacking(model: Any) -> Iterator[None]:
    """A block in which the 4-bit linears of a model keep their weights as they are stored."""
    before = [m for m in model.modules() if m.__dict__.get(_REPACKS)]
    for module in before:
        module.__dict__[_REPACKS] = False
    try:
        yield
    finally:
        for module in before:
            module.__dict__[_REPACKS] = True
