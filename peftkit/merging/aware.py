"""Layers that were tuned for their storage (``merge_into``): what was tuned is the rounded weight, not the sum of base and adapter."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.base.storage import Storage
from peftkit.fuse.merge_into import merge_into_of
from peftkit.merging.arithmetic import DecodedLinear
from peftkit.merging.units import merged_module, units_of

_STORED = "_peftkit_tuned_as_stored"


def compute_as_stored(base: nn.Module, units: dict[str, Any]) -> None:
    """Let copied layers compute with the weight that a merge stores, if the original was tuned with ``merge_into`` on a quantised base.

    Args:
        base: The model that was tuned.
        units: Its layers with adapters in a float32 copy, by name; changed in place.
    """
    for name, unit in units_of(base).items():
        copied = units.get(name)
        if merge_into_of(unit) is None or copied is None:
            continue
        linear = copied.get_base_layer()
        if isinstance(linear, DecodedLinear):
            copied.__dict__[_STORED] = True
            copied.__dict__["forward"] = _Stored(copied, linear, name)


def is_tuned_as_stored(unit: nn.Module) -> bool:
    """Whether a copied layer computes with the stored weight."""
    return unit.__dict__.get(_STORED, False)


class _Stored:
    """The forward of a copied layer."""

    def __init__(self, unit: Any, linear: DecodedLinear, name: str):
        self.unit, self.linear, self.name = unit, linear, name

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain: Any = merged_module(self.unit, {id(self.linear): self.linear.dense()}, self.name)
        storage: Storage = self.linear.__dict__["storage"]
        return F.linear(x, storage.quantized(plain.weight.detach()).dense(), plain.bias)
