"""PEFT's LoRA layers with a fused forward. Only the class of the layer changes.

Parameters, names, config and checkpoints stay PEFT's. Every case that is not supported runs PEFT's own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.find.modules import is_quantised
from peftkit.fp8 import Float8Linear
from peftkit.fuse import convolution
from peftkit.fuse.adapter import (
    changed_reason,
    class_reason,
    current_adapter,
    has_hooks,
    method,
    weight_reason,
)
from peftkit.fuse.compute import LinearParts, backend_of, draw_seeds, linear
from peftkit.fuse.merge_into import merge_into_of, merged_weight, require_merged
from peftkit.fuse.plan import Fused, Reason
from peftkit.swap import swap_in
from peftkit_kernels.core.checks import is_autocast_enabled
from peftkit_kernels.core.dispatch import is_transformed
from peftkit_kernels.low_rank import LoRA

_FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_QUANTIZED = "Linear4bit", "Linear8bitLt"

_DIFFERENT_DTYPES = Reason("its linears compute in different dtypes, so each runs separately")

_SEED = Reason(
    "dropout under torch.compile or torch.func: the seed is a Python int and would break the graph"
)

_ARGUMENTS = Reason("it was called with further arguments, such as adapter_names")


class FusedLoRA(Fused):
    """The fused forward of PEFT's linear layers; mixed into each of their classes.

    The method ``_weight`` of a subclass reads the weight of its kind of base layer.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward, fused if ``peftkit_plan`` says so.

        Args:
            x: ``[..., in_features]``.
            args: As for PEFT's own forward, which runs if there are any.
            kwargs: As for PEFT's own forward, which runs if there are any.
        """
        if args or kwargs:
            require_merged(self, _ARGUMENTS)
            return super().forward(x, *args, **kwargs)
        siblings = self.__dict__.get("_peftkit_siblings")
        if siblings is not None:
            y = siblings.output_for(self, x)
            if y is not None:
                return y
        parts = self.peftkit_plan(x)
        if isinstance(parts, Reason):
            require_merged(self, parts)
            return super().forward(x)
        if parts.lora.p and parts.magnitude is not None:
            return self._dora_with_dropout(x, parts)
        return self._run(x, draw_seeds(parts))

    def peftkit_plan(self: Any, x: Tensor) -> LinearParts | Reason:
        """The tensors that a forward on ``x [..., in_features]`` multiplies, or why PEFT's own forward runs.

        The dropout seed is drawn later (``draw_seeds``), so making a plan does not change the random state.
        """
        found = current_adapter(self, self._modules["base_layer"])
        if isinstance(found, Reason):
            return found
        reason = changed_reason(self, found)
        if reason is not None:
            return reason
        weight = self._weight(found.base, x)
        if isinstance(weight, Reason):
            return weight
        if "bias" not in found.base._parameters:
            return Reason("the bias of its base layer is parametrised")
        A, B = found.A._parameters["weight"], found.B._parameters["weight"]
        if A.dtype not in _FACTOR_DTYPES or A.dtype is not B.dtype:
            return Reason(f"its factors are {A.dtype} and {B.dtype}")
        if A.device != x.device or B.device != x.device:
            return Reason(
                f"its input is on {x.device} and its factors are on {A.device} and {B.device}"
            )
        p = drop_rate(found.dropout)
        if p and is_transformed():
            return _SEED
        magnitude = None
        if found.magnitude is not None:
            found.magnitude._cache_clear()  # as PEFT's forward does unless it caches
            magnitude = found.magnitude._parameters["weight"]
        lora = LoRA(A, B, self.scaling[found.name], p, 0)
        into = merge_into_of(self)
        if into is not None:
            weight = merged_weight(into, found, weight, lora)
            if isinstance(weight, Reason):
                return weight
        return LinearParts(weight, found.base._parameters["bias"], lora, magnitude)

    def peftkit_joined(self, x: Tensor) -> LinearParts | Reason:
        """``peftkit_plan`` for an op that also computes other linears; it says in which ``dtype`` this one computes."""
        return self.peftkit_plan(x)

    def peftkit_example(self: Any) -> Tensor:
        """One row of input with the dtype and device of the base weight."""
        weight = self.get_base_layer().weight
        dtype = self._activation_dtype() if is_quantised(weight) else weight.dtype
        return torch.empty(1, self.in_features, dtype=dtype, device=weight.device)

    def peftkit_backend(self, x: Tensor, parts: LinearParts) -> str:
        """``"torch"`` or ``"triton"``."""
        return backend_of(x, parts)

    @property
    def peftkit_method(self) -> str:
        """``"LoRA"`` or ``"DoRA"``, and the format of its merged weight if one was chosen (``"LoRA merged into nf4"``)."""
        into = merge_into_of(self)
        return method(self) if into is None else f"{method(self)} merged into {into}"

    def _activation_dtype(self: Any) -> torch.dtype:
        """The dtype of the input of a base layer whose weight is quantised."""
        floating = (p.dtype for p in self.parameters() if p.is_floating_point())
        return next(floating, torch.float32)

    def _run(self, x: Tensor, parts: LinearParts) -> Tensor:
        return linear(x, parts)

    def _weight(self, base: Any, x: Tensor) -> Any:
        """The base weight in the form that an op takes, or the ``Reason`` why it cannot be multiplied by this input."""
        raise NotImplementedError

    def _dora_with_dropout(self: Any, x: Tensor, parts: LinearParts) -> Tensor:
        """DoRA as PEFT combines it with dropout.

        PEFT applies dropout to the adapter and to the magnitude's change of the base output, but not to the base layer:
        ``x Wᵀ + bias + (g - 1) · drop(x) Wᵀ + g · scale · drop(x) Aᵀ Bᵀ``. This equals ``(x - drop(x)) Wᵀ + bias`` plus the
        DoRA of ``drop(x)``.
        """
        found: Any = current_adapter(self, self._modules["base_layer"])
        dropped = found.dropout(x)
        undropped = parts._replace(lora=replace(parts.lora, p=0.0))
        rest = self._run(x - dropped, undropped._replace(lora=None, magnitude=None))
        return rest + self._run(dropped, undropped._replace(bias=None))


class FusedLinear(FusedLoRA):
    """PEFT's ``lora.Linear`` whose forward is one ``lora_linear``."""

    def _weight(self, base: Any, x: Tensor) -> Tensor | Reason:
        reason = weight_reason(base) or input_reason(x, base._parameters["weight"])
        if reason is not None:
            return reason
        weight = base._parameters["weight"]
        return weight if type(base) is nn.Linear else weight.t()


def drop_rate(dropout: nn.Module) -> float:
    """The probability with which a forward drops an element."""
    return dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0


def input_reason(x: Tensor, weight: Tensor) -> Reason | None:
    """Why the ops cannot multiply ``x`` by this frozen weight. They need plain tensors of one device and dtype (or autocast)."""
    if type(weight) is not nn.Parameter:
        return Reason(f"its base weight is a {type(weight).__name__}, not a plain parameter")
    if not isinstance(x, Tensor):
        return Reason(f"its input is a {type(x).__name__}, not a tensor")
    if x.device != weight.device:
        return Reason(f"its input is on {x.device} and its base weight on {weight.device}")
    if x.dtype is not weight.dtype and not is_autocast_enabled(x.device.type):
        return Reason(f"its input is {x.dtype} and its base weight {weight.dtype}")
    return None


def is_quantized(module: Any) -> bool:
    """Whether this is a quantised linear, of bitsandbytes or in float8, without an adapter."""
    kind = type(module)
    if kind is Float8Linear:
        return True
    return kind.__module__ == "bitsandbytes.nn.modules" and kind.__name__ in _QUANTIZED


def plan_linear(module: Any, x: Tensor) -> LinearParts | Reason:
    """The parts of a linear inside a larger module: a fused LoRA layer, or a frozen linear, plain or of bitsandbytes."""
    if has_hooks(module):
        return Reason("it has hooks")
    if isinstance(module, Fused):
        parts = (
            module.peftkit_joined(x) if isinstance(module, FusedLoRA) else module.peftkit_plan(x)
        )
        if isinstance(parts, (Reason, LinearParts)):
            return parts
    if type(module) is Float8Linear:
        from peftkit.fuse import float8

        return float8.plan_frozen(module, x)
    if is_quantized(module):
        # This imports bitsandbytes, but the existence of such a layer means that it is imported already.
        from peftkit.fuse import quantized

        return quantized.plan_frozen(module, x)
    if type(module) is not nn.Linear:
        return Reason(f"it is a {type(module).__name__}")
    reason = weight_reason(module) or input_reason(x, module._parameters["weight"])
    return reason or LinearParts(module.weight, module.bias, None)


def different_dtypes(parts: Sequence[LinearParts]) -> Reason | None:
    """Why these linears cannot be computed by one op: because they compute in different dtypes."""
    return None if len({part.dtype for part in parts}) == 1 else _DIFFERENT_DTYPES


def fuse_layer(module: nn.Module) -> bool:
    """Give one PEFT LoRA layer its fused forward; returns ``False`` if its class has none."""
    stock = type(module)
    if stock in convolution.CLASSES:
        swap_in(module, convolution.ShowsSizes)
        return False
    mixin = _mixin(stock, module)
    if mixin is None or class_reason(module) is not None:
        return False
    swap_in(module, mixin)
    layer: Any = module
    # fills the cache before torch.compile traces the layer
    current_adapter(layer, layer.get_base_layer())
    return True


def _mixin(stock: type, layer: Any) -> Any:
    """The mixin that fuses exactly this class of PEFT's on the base layer of ``layer``, or ``None``."""
    from peft.tuners.lora.layer import Linear, ParamWrapper

    if stock is Linear and type(layer.base_layer) is Float8Linear:
        from peftkit.fuse.float8 import FusedFloat8Linear

        return FusedFloat8Linear
    if stock is Linear:
        return FusedLinear
    if stock is ParamWrapper:
        from peftkit.fuse.experts import FusedParamWrapper

        return FusedParamWrapper
    if stock.__module__ == "peft.tuners.lora.bnb":
        # This imports bitsandbytes, but the existence of such a layer means that it is imported already.
        from peftkit.fuse import quantized

        return quantized.MIXINS.get(stock)
    return None
