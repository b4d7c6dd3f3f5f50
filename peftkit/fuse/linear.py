"""PEFT's LoRA layers with a fused forward: a change of class, nothing else.

Parameters, names, config and checkpoints stay PEFT's; whatever is not covered runs PEFT's own forward.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear, ParamWrapper
from torch import Tensor, nn

from peftkit.fuse import convolution
from peftkit.fuse.compute import Frozen, linear
from peftkit.fuse.eligibility import (
    class_obstacle,
    has_hooks,
    is_dora,
    keeps_norm,
    method,
    obstacle,
    state_obstacle,
)
from peftkit_kernels.checks import is_autocast_enabled
from peftkit_kernels.dispatch import choose_backend, is_transformed
from peftkit_kernels.dropout import draw_seed
from peftkit_kernels.low_rank import LoRA

_FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Plan(NamedTuple):
    """The modules one forward needs, found once for a set of active adapters."""

    active: Any
    name: str
    base: nn.Module
    A: nn.Module
    B: nn.Module
    dropout: nn.Module
    magnitude: nn.Module | None


class FusedLoRA:
    """The fused forward of PEFT's linear layers; mixed in before each of their classes.

    A subclass says by ``_weight`` how its base layer stores the weight.
    """

    _peftkit_fused = True
    _peftkit_stock: type[nn.Module]

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward, fused where ``frozen_linear`` says it may be.

        Args:
            x: ``[..., in_features]``.
            args: As PEFT's own forward, which then runs.
            kwargs: As PEFT's own forward, which then runs.
        """
        if args or kwargs:
            return super().forward(x, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        group = self.__dict__.get("_peftkit_group")
        if group is not None:
            y = group.take(self, x)
            if y is not None:
                return y
        parts = self.frozen_linear(x)
        if parts is not None:
            return self._run(x, parts)
        y = self._dora_with_dropout(x)
        return super().forward(x) if y is None else y  # pyright: ignore[reportAttributeAccessIssue]

    def frozen_linear(self: Any, x: Tensor) -> Frozen | None:
        """The tensors of this forward, dropout seed drawn, or ``None`` where another forward has to run."""
        plan = self._open_plan(x)
        if plan is None:
            return None
        p = drop_rate(plan.dropout)
        # a seed is a Python number, which would break the graph; and the dropout of DoRA is not that of the op
        if p and (plan.magnitude is not None or is_transformed()):
            return None
        return self._frozen(plan, x, p)

    def peftkit_verdict(self: Any) -> tuple[str, str]:
        """The path a forward takes in the present state, and the reason where it is PEFT's own."""
        reason = obstacle(self)
        if reason:
            return "peft", reason
        weight, rank = self.get_base_layer().weight, self.r[self.active_adapters[0]]
        return f"fused:{choose_backend('lora_linear', 'auto', weight, rank=rank)}", ""

    @property
    def peftkit_method(self) -> str:
        """``"LoRA"`` or ``"DoRA"``."""
        return method(self)

    def drops_within_dora(self: Any) -> bool:
        """Whether a forward in the present state is that of a DoRA layer with dropout, which no op on several layers knows."""
        active = [name for name in self.active_adapters if is_dora(self, name)]
        return any(drop_rate(self.lora_dropout[name]) > 0 for name in active)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by a function: this class goes by the name of PEFT's."""
        state = {key: value for key, value in self.__dict__.items() if key != "_peftkit_plan"}
        return _new_layer, (self._peftkit_stock,), state

    def _run(self, x: Tensor, parts: Frozen) -> Tensor:
        return linear(x, parts)

    def _weight(self, base: Any, x: Tensor) -> Any:
        """The base weight as an op takes it, or ``None`` where it does not go with this input."""
        raise NotImplementedError

    def _dora_with_dropout(self: Any, x: Tensor) -> Tensor | None:
        """DoRA as PEFT combines it with dropout, or ``None`` where PEFT's own forward has to run.

        PEFT drops in the adapter and in what the magnitude adds to the base layer, but not in the base layer itself:
        ``x Wᵀ + bias + (g - 1) · drop(x) Wᵀ + g · scale · drop(x) Aᵀ Bᵀ``, that is ``(x - drop(x)) Wᵀ + bias`` and the
        DoRA of ``drop(x)``.
        """
        plan = self._open_plan(x)
        if plan is None or plan.magnitude is None:
            return None
        whole = self._frozen(plan, x, 0.0)
        if whole is None:
            return None
        dropped = plan.dropout(x)
        rest = self._run(x - dropped, whole._replace(lora=None, magnitude=None))
        return rest + self._run(dropped, whole._replace(bias=None))

    def _frozen(self: Any, plan: _Plan, x: Tensor, p: float) -> Frozen | None:
        weight = self._weight(plan.base, x)
        A, B = plan.A._parameters["weight"], plan.B._parameters["weight"]
        if weight is None or A.dtype not in _FACTOR_DTYPES or A.dtype is not B.dtype:
            return None
        lora = LoRA(A, B, self.scaling[plan.name], p, draw_seed() if p else 0)
        magnitude = None
        if plan.magnitude is not None:
            plan.magnitude._cache_clear()  # as PEFT's forward does where it keeps nothing
            magnitude = plan.magnitude._parameters["weight"]
        return Frozen(weight, plan.base._parameters["bias"], lora, magnitude)

    def _open_plan(self: Any, x: Tensor) -> _Plan | None:
        """The plan of the active adapter, made anew where it is out of date, or ``None`` where it may not run fused."""
        state = self.__dict__
        plan = state.get("_peftkit_plan")
        if plan is None or not self._is_current(plan):
            plan = state["_peftkit_plan"] = self._make_plan()
        return plan if plan.base is not None and self._is_open(plan) else None

    def _is_current(self: Any, plan: _Plan) -> bool:
        """Whether the plan still names the active adapter and the modules that are here now."""
        if plan.active != self.__dict__["_active_adapter"]:
            return False
        if plan.base is None:
            return True
        modules, name = self._modules, plan.name
        return (
            modules["base_layer"] is plan.base
            and modules["lora_A"]._modules.get(name) is plan.A
            and modules["lora_B"]._modules.get(name) is plan.B
            and modules["lora_dropout"]._modules.get(name) is plan.dropout
            and modules["lora_magnitude_vector"]._modules.get(name) is plan.magnitude
        )

    def _is_open(self: Any, plan: _Plan) -> bool:
        """The part of the verdict that anyone may change by an assignment, looked at in every forward."""
        state = self.__dict__
        if (
            state["_disable_adapters"]
            or state["merged_adapters"]
            or not state["cast_input_dtype_enabled"]
        ):
            return False
        base, A, B, dropout = plan.base, plan.A, plan.B, plan.dropout
        if has_hooks(base) or has_hooks(A) or has_hooks(B) or has_hooks(dropout):
            return False
        magnitude = plan.magnitude
        if magnitude is not None and (has_hooks(magnitude) or keeps_norm(magnitude)):
            return False
        return (
            "weight" in base._parameters and "weight" in A._parameters and "weight" in B._parameters
        )

    def _make_plan(self: Any) -> _Plan:
        active = (
            self._active_adapter
            if isinstance(self._active_adapter, str)
            else list(self._active_adapter)
        )
        if state_obstacle(self) or class_obstacle(self):
            return _Plan(active, "", *[None] * 4, None)  # pyright: ignore[reportArgumentType]
        name = next(name for name in self.active_adapters if name in self.lora_A)
        return _Plan(
            active,
            name,
            self.base_layer,
            self.lora_A[name],
            self.lora_B[name],
            self.lora_dropout[name],
            self.lora_magnitude_vector[name] if is_dora(self, name) else None,
        )


def _dropping_plan(method: str) -> Any:
    """PEFT's method, after which the layer looks again at what it may do."""

    @functools.wraps(getattr(Linear, method))
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        vars(self).pop("_peftkit_plan", None)
        try:
            return getattr(super(FusedLoRA, self), method)(*args, **kwargs)
        finally:
            vars(self).pop("_peftkit_plan", None)

    return call


for _method in (
    "set_adapter",
    "enable_adapters",
    "merge",
    "unmerge",
    "update_layer",
    "delete_adapter",
):
    setattr(FusedLoRA, _method, _dropping_plan(_method))


class FusedLinear(FusedLoRA, Linear):
    """PEFT's ``lora.Linear`` whose forward is one ``lora_linear``."""

    _peftkit_stock = Linear

    def _weight(self, base: Any, x: Tensor) -> Tensor | None:
        weight = base._parameters["weight"]
        if not takes_input(x, weight, base._parameters["bias"]):
            return None
        return weight if type(base) is nn.Linear else weight.t()


# PEFT finds and reports layers by class name: "all-linear" looks for "Linear" in it
FusedLinear.__name__ = FusedLinear.__qualname__ = "Linear"


def drop_rate(dropout: nn.Module) -> float:
    """The probability with which a forward drops."""
    return dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0


def takes_input(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the ops can multiply ``x`` by this frozen weight: plain tensors of one device and dtype (or autocast)."""
    if (
        type(weight) is not nn.Parameter
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return False
    if x.device != weight.device or not isinstance(x, Tensor):
        return False
    return x.dtype is weight.dtype or is_autocast_enabled(x.device.type)


def frozen_part(module: Any, x: Tensor) -> Frozen | None:
    """A fused LoRA layer or a plain frozen ``nn.Linear`` as tensors, or ``None`` where neither applies."""
    if has_hooks(module):
        return None
    if isinstance(module, (FusedLinear, ParamWrapper)) and hasattr(module, "frozen_linear"):
        return module.frozen_linear(x)
    if type(module) is not nn.Linear or "weight" not in module._parameters:
        return None
    return (
        Frozen(module.weight, module.bias, None)
        if takes_input(x, module.weight, module.bias)
        else None
    )


def fuse_layer(module: nn.Module) -> bool:
    """Give one PEFT LoRA layer its fused forward; ``False`` where there is none for its class."""
    kind = type(module)
    if kind in convolution.CLASSES:
        module.__class__ = convolution.CLASSES[kind]
        return False
    fused = _fused_class(kind)
    if fused is None or class_obstacle(module):
        return False
    module.__class__ = fused
    return True


def restore_layer(module: nn.Module) -> None:
    """Make a fused layer PEFT's own again."""
    if getattr(type(module), "_peftkit_fused", False):
        for name in ("_peftkit_plan", "_peftkit_group"):
            vars(module).pop(name, None)
        module.__class__ = type(module)._peftkit_stock  # pyright: ignore[reportAttributeAccessIssue]


def _fused_class(stock: type) -> Any:
    """The class that fuses exactly this class of PEFT's, or ``None``."""
    if stock is Linear:
        return FusedLinear
    if stock is ParamWrapper:
        from peftkit.fuse.experts import FusedParamWrapper

        return FusedParamWrapper
    if stock.__module__ == "peft.tuners.lora.bnb":
        # imports bitsandbytes, which whoever made such a layer has done already
        from peftkit.fuse import quantized

        return quantized.CLASSES.get(stock)
    return None


def _new_layer(stock: type) -> nn.Module:
    fused = _fused_class(stock)
    return fused.__new__(fused)
