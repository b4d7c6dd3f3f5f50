"""PEFT's LoRA layers on linears that are stored in float8."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peftkit.errors import ContractError
from peftkit.fp8 import Float8Linear
from peftkit.fuse.adapter import is_own_function, weight_reason
from peftkit.fuse.compute import LinearParts
from peftkit.fuse.linear import FusedLinear
from peftkit.fuse.plan import Reason
from peftkit_kernels.storage.fp8 import Float8Weight


class FusedFloat8Linear(FusedLinear):
    """PEFT's ``lora.Linear`` on a ``Float8Linear``, whose forward is one ``fp8_linear``.

    DoRA scales the output of this op. Adapters cannot be merged into codes.
    """

    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        """PEFT's merge, which needs a base layer that is not quantised.

        Raises:
            ContractError: The base layer is stored in float8.
        """
        if isinstance(self.get_base_layer(), Float8Linear):
            raise ContractError(
                "adapters cannot be merged into a base layer in float8: rounding the sum to its codes would lose most of them. Decode the "
                "base layers first: peftkit.from_fp8(model)"
            )
        super().merge(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _activation_dtype(self: Any) -> Any:
        base = self.get_base_layer()
        return base.compute_dtype if isinstance(base, Float8Linear) else super()._activation_dtype()

    def _weight(self, base: Any, x: Tensor) -> Any:
        return _stored(base, x) if type(base) is Float8Linear else super()._weight(base, x)


def plan_frozen(base: Any, x: Tensor) -> LinearParts | Reason:
    """The parts of a ``Float8Linear`` without an adapter, for an op that computes it as it is."""
    if not is_own_function(type(base), "forward"):
        return Reason("the forward of Float8Linear was replaced")
    weight = _stored(base, x)
    return weight if isinstance(weight, Reason) else LinearParts(weight, base.bias, None)


def _stored(base: Float8Linear, x: Tensor) -> Float8Weight | Reason:
    """The weight, or why it cannot be multiplied by ``x``."""
    if not x.is_floating_point():
        return Reason(f"its input is {x.dtype}")
    if x.device != base.weight.device:
        return Reason(f"its input is on {x.device} and its base weight on {base.weight.device}")
    return weight_reason(base) or base.stored()
