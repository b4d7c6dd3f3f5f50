"""PEFT's LoRA layers on bitsandbytes' linears, fused without changing the stored weights."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import bnb
from torch import Tensor

from peftkit.fuse.adapter import weight_reason
from peftkit.fuse.compute import LinearParts, backend_of, linear
from peftkit.fuse.linear import FusedLoRA
from peftkit.fuse.plan import Reason
from peftkit.fuse.storage import (
    StorageSeen,
    int8_obstacle,
    int8_weight,
    nf4_obstacle,
    nf4_repacked,
    nf4_weight,
)
from peftkit_kernels.core.checks import without_autocast
from peftkit_kernels.core.dispatch import is_transformed
from peftkit_kernels.storage.int8 import Int8Weight
from peftkit_kernels.storage.nf4 import NF4Weight

_STORAGE = "_peftkit_storage"

_TRANSFORMED = Reason("under torch.compile and torch.func bitsandbytes' own operations run")


class FusedLinear4bit(FusedLoRA):
    """PEFT's ``Linear4bit`` whose forward is one ``nf4_linear``."""

    def peftkit_backend(self: Any, x: Tensor, parts: LinearParts) -> str:
        """``"torch"`` or ``"triton"``, depending on the dtype in which the base layer computes."""
        with without_autocast(x):
            return backend_of(self._compute_input(x), parts)

    def _weight(self: Any, base: Any, x: Tensor) -> NF4Weight | Reason:
        reason = input_reason(base, x) or nf4_repacked(base)
        if reason is not None:
            return reason
        seen = self.__dict__.get(_STORAGE)
        if seen is None or not seen.is_of(base):
            reason = nf4_obstacle(base)
            if reason is not None:
                return reason
            self.__dict__[_STORAGE] = StorageSeen(base)
        return nf4_weight(base)

    def _run(self, x: Tensor, parts: LinearParts) -> Tensor:
        """Compute like the base layer: in its ``compute_dtype`` even under autocast, with the result in the dtype of ``x``."""
        with without_autocast(x):
            return linear(self._compute_input(x), parts).to(x.dtype)

    def _compute_input(self: Any, x: Tensor) -> Tensor:
        return x.to(self.base_layer.compute_dtype or x.dtype)


class FusedLinear8bitLt(FusedLoRA):
    """PEFT's ``Linear8bitLt`` whose forward in training on the CPU is one ``int8_linear``."""

    def _weight(self, base: Any, x: Tensor) -> Int8Weight | Reason:
        return input_reason(base, x) or int8_obstacle(base) or int8_weight(base)


def input_reason(base: Any, x: Tensor) -> Reason | None:
    """Why the ops cannot multiply ``x`` by this base layer's weight."""
    if is_transformed():
        return _TRANSFORMED
    if not x.is_floating_point():
        return Reason(f"its input is {x.dtype}")
    if x.device != base.weight.device:
        return Reason(f"its input is on {x.device} and its base weight on {base.weight.device}")
    return weight_reason(base)


MIXINS = {bnb.Linear4bit: FusedLinear4bit, bnb.Linear8bitLt: FusedLinear8bitLt}
