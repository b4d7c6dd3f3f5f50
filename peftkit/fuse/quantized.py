"""PEFT's LoRA layers on bitsandbytes' linears, fused on the weights as they are stored."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import bnb
from torch import Tensor

from peftkit.fuse.compute import Frozen, linear
from peftkit.fuse.linear import FusedLoRA
from peftkit.fuse.storage import int8_obstacle, int8_weight, is_nf4_packed, nf4_weight
from peftkit_kernels.checks import is_autocast_enabled
from peftkit_kernels.dispatch import is_transformed
from peftkit_kernels.int8 import Int8Weight
from peftkit_kernels.nf4 import NF4Weight


class FusedLinear4bit(FusedLoRA, bnb.Linear4bit):
    """PEFT's ``Linear4bit`` whose forward is one ``nf4_linear``."""

    _peftkit_stock = bnb.Linear4bit

    def _weight(self, base: Any, x: Tensor) -> NF4Weight | None:
        return nf4_weight(base) if _takes(base, x) and is_nf4_packed(base) else None

    def _run(self, x: Tensor, parts: Frozen) -> Tensor:
        """As the base layer does it: in its ``compute_dtype``, whatever autocast says, returned in the dtype of ``x``."""
        dtype = self.base_layer.compute_dtype or x.dtype
        with torch.autocast(x.device.type, enabled=False):
            return linear(x.to(dtype), parts).to(x.dtype)


class FusedLinear8bitLt(FusedLoRA, bnb.Linear8bitLt):
    """PEFT's ``Linear8bitLt`` whose forward in training on the CPU is one ``int8_linear``."""

    _peftkit_stock = bnb.Linear8bitLt

    def _weight(self, base: Any, x: Tensor) -> Int8Weight | None:
        if is_autocast_enabled(x.device.type) or int8_obstacle(base):
            return None
        return int8_weight(base) if _takes(base, x) else None


def _takes(base: Any, x: Tensor) -> bool:
    """Whether the ops can multiply ``x`` by this base layer's weight; under ``torch.compile`` and ``torch.func`` it is left to bitsandbytes."""
    return (
        not is_transformed()
        and x.is_floating_point()
        and x.device == base.weight.device
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
    )


CLASSES = {bnb.Linear4bit: FusedLinear4bit, bnb.Linear8bitLt: FusedLinear8bitLt}

# PEFT finds and reports layers by class name
for _stock, _fused in CLASSES.items():
    _fused.__name__ = _fused.__qualname__ = _stock.__name__
