"""PEFT's LoRA layers on bitsandbytes' linears, fused without changing the stored weights."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora import bnb
from torch import Tensor

from peftkit.fuse.adapter import is_own_function, weight_reason
from peftkit.fuse.compute import LinearParts, backend_of, linear, linear_in
from peftkit.fuse.int8_mode import int8_mode_of
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
from peftkit.fuse.uneven_rows import require_even
from peftkit_kernels.core.checks import autocast_dtype, is_autocast_enabled, without_autocast
from peftkit_kernels.core.dispatch import is_transformed
from peftkit_kernels.storage.int8 import Int8ComputeWeight, Int8Weight
from peftkit_kernels.storage.nf4 import NF4Weight
from peftkit_kernels.storage.quantized import contains_update

_seen: WeakKeyDictionary[Any, StorageSeen] = WeakKeyDictionary()
"""The storage of each 4-bit base layer that has no ``nf4_obstacle``."""

_IN_8_BITS = Reason("DoRA on a base layer that multiplies in 8 bits runs PEFT's forward")
_TRANSFORMED = Reason("under torch.compile and torch.func bitsandbytes' own operations run")


class FusedLinear4bit(FusedLoRA):
    """PEFT's ``Linear4bit`` whose forward is one ``nf4_linear``."""

    def peftkit_backend(self: Any, x: Tensor, parts: LinearParts) -> str:
        """``"torch"`` or ``"triton"``, depending on the dtype in which the base layer computes."""
        with without_autocast(x):
            return backend_of(self._compute_input(x), parts)

    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        """PEFT's merge, if bitsandbytes decodes the weight as it is stored.

        Raises:
            ContractError: It does not.
        """
        require_even(self.get_base_layer())
        super().merge(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue] - of PEFT's layer

    def _activation_dtype(self: Any) -> torch.dtype:
        return self.base_layer.compute_dtype or super()._activation_dtype()

    def _weight(self: Any, base: Any, x: Tensor) -> NF4Weight | Reason:
        return _four_bit(base, x)

    def peftkit_joined(self: Any, x: Tensor) -> LinearParts | Reason:
        """``peftkit_plan``, and the dtype in which the base layer computes if that is not the dtype of ``x`` or of autocast."""
        parts = self.peftkit_plan(x)
        if isinstance(parts, Reason):
            return parts
        base = self._modules["base_layer"]
        reason = None if contains_update(parts.weight) else _narrowing_reason(base, x)
        return reason or parts._replace(dtype=_own_dtype(base, x))

    def _run(self: Any, x: Tensor, parts: LinearParts) -> Tensor:
        """Compute like the base layer: in its ``compute_dtype`` even under autocast, with the result in the dtype of ``x``."""
        # a merged layer has no adapter that could get the input unrounded
        alone = not contains_update(parts.weight)
        if alone and _narrowing_reason(self.base_layer, x) is not None:
            return linear_in(self.base_layer.compute_dtype, x, parts)
        with without_autocast(x):
            return linear(self._compute_input(x), parts).to(x.dtype)

    def _compute_input(self: Any, x: Tensor) -> Tensor:
        return x.to(self.base_layer.compute_dtype or x.dtype)


class FusedLinear8bitLt(FusedLoRA):
    """PEFT's ``Linear8bitLt`` whose forward is one ``int8_linear``: on the CPU in training, on a GPU with 8-bit products.

    DoRA scales a decoded weight. It runs PEFT's forward if only bitsandbytes would multiply in 8 bits, and with a decoded weight
    if the user has chosen the products.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As ``FusedLoRA.forward``; the base layer can be multiplied again afterwards."""
        y = super().forward(x, *args, **kwargs)
        if self.lora_magnitude_vector:
            _keep_factors(self.base_layer)
        return y

    def peftkit_plan(self: Any, x: Tensor) -> LinearParts | Reason:
        """As ``FusedLoRA.peftkit_plan``."""
        parts = super().peftkit_plan(x)
        if isinstance(parts, Reason) or parts.magnitude is None:
            return parts
        if not isinstance(parts.weight, Int8ComputeWeight):
            return parts
        if int8_mode_of(self._modules["base_layer"]) is None:
            return _IN_8_BITS
        return parts._replace(weight=Int8Weight(*parts.weight.tensors()))

    def _weight(self, base: Any, x: Tensor) -> Int8Weight | Reason:
        return _eight_bit(base, x)


def _keep_factors(base: Any) -> None:
    """Give an 8-bit weight its row factors again if PEFT's DoRA has replaced it.

    On a CPU PEFT decodes the weight and puts a new one with the same codes in its place, which bitsandbytes takes for one that was just
    quantised: its next forward would fetch the factors from it, where they are no more.
    """
    weight, state = base.weight, base.state
    if weight.CB is not None and weight.SCB is None:
        weight.SCB = state.SCB


def plan_frozen(base: Any, x: Tensor) -> LinearParts | Reason:
    """The parts of a linear of bitsandbytes without an adapter, for an op that computes it as it is."""
    if not is_own_function(type(base), "forward"):
        return Reason(f"the forward of {type(base).__name__} was replaced")
    dtype = None
    if isinstance(base, Linear4bit):
        weight = _narrowing_reason(base, x) or _four_bit(base, x)
        dtype = _own_dtype(base, x)
    else:
        weight = _eight_bit(base, x)
    if isinstance(weight, Reason):
        return weight
    return LinearParts(weight, base.bias, None, dtype=dtype)


def _four_bit(base: Any, x: Tensor) -> NF4Weight | Reason:
    """The weight of a ``Linear4bit``, or why it cannot be read or multiplied by ``x``."""
    reason = input_reason(base, x) or nf4_repacked(base)
    if reason is not None:
        return reason
    seen = _seen.get(base)
    if seen is None or not seen.is_of(base):
        reason = nf4_obstacle(base)
        if reason is not None:
            return reason
        _seen[base] = StorageSeen(base)
    return nf4_weight(base)


def _eight_bit(base: Any, x: Tensor) -> Int8Weight | Reason:
    """The weight of a ``Linear8bitLt``, or why it cannot be read or multiplied by ``x``."""
    reason = input_reason(base, x) or int8_obstacle(base)
    if reason is not None:
        return reason
    weight = int8_weight(base)
    in_8_bits = isinstance(weight, Int8ComputeWeight) and int8_mode_of(base) is None
    if in_8_bits and (autocast_dtype(x) or x.dtype) is not x.dtype:
        return Reason(f"under autocast its input is {x.dtype}, which its base layer keeps")
    return weight


def _own_dtype(base: Any, x: Tensor) -> torch.dtype | None:
    """The dtype in which a ``Linear4bit`` computes, also under autocast; ``None`` if its input has it and autocast keeps it."""
    dtype = base.compute_dtype or x.dtype
    return None if dtype is x.dtype and (autocast_dtype(x) or dtype) is dtype else dtype


def _narrowing_reason(base: Any, x: Tensor) -> Reason | None:
    """Why a ``Linear4bit`` runs alone: it rounds its input, and the adapters of an op would then get a rounded input too.

    Under autocast PEFT's adapters get a rounded input themselves.
    """
    dtype = base.compute_dtype or x.dtype
    if dtype.itemsize >= x.dtype.itemsize or is_autocast_enabled(x.device.type):
        return None
    return Reason(
        f"its input is {x.dtype} and its base layer computes in {dtype}, so each linear runs separately"
    )


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
