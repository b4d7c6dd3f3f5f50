"""PEFT's LoRA layers with a fused forward: a change of class, nothing else.

Parameters, names, config and checkpoints stay PEFT's; whatever is not covered runs PEFT's own forward.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from peftkit.lora.eligibility import class_obstacle, has_hooks, obstacle, state_obstacle
from peftkit_kernels.dispatch import choose_backend
from peftkit_kernels.dropout import draw_seed
from peftkit_kernels.lora_linear import lora_linear
from peftkit_kernels.low_rank import LoRA

_FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Frozen(NamedTuple):
    """A frozen linear with its adapter, as plain tensors: what an op takes."""

    weight: Tensor
    bias: Tensor | None
    lora: LoRA | None


class _Plan(NamedTuple):
    """The modules one forward needs, found once for a set of active adapters."""

    active: Any
    name: str
    base: nn.Module
    A: nn.Module
    B: nn.Module
    dropout: nn.Module
    transposed: bool


class FusedLinear(Linear):
    """PEFT's ``lora.Linear`` whose forward is one ``lora_linear``."""

    _peftkit_fused = True
    peftkit_method = "LoRA"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward, fused where ``frozen_linear`` says it may be.

        Args:
            x: ``[..., in_features]``.
            args: As PEFT's own forward, which then runs.
            kwargs: As PEFT's own forward, which then runs.
        """
        if args or kwargs:
            return super().forward(x, *args, **kwargs)
        group = self.__dict__.get("_peftkit_group")
        if group is not None:
            y = group.take(self, x)
            if y is not None:
                return y
        parts = self.frozen_linear(x)
        if parts is None or parts.lora is None:
            return super().forward(x)
        return lora_linear(x, parts.weight, parts.bias, parts.lora)

    def frozen_linear(self, x: Tensor) -> Frozen | None:
        """The tensors of this forward, dropout seed drawn, or ``None`` where PEFT's own forward has to run."""
        state = self.__dict__
        plan = state.get("_peftkit_plan")
        if plan is None or not self._is_current(plan):
            plan = state["_peftkit_plan"] = self._make_plan()
        if plan.base is None or not self._is_open(plan):
            return None
        weight, bias = plan.base._parameters["weight"], plan.base._parameters["bias"]
        A, B = plan.A._parameters["weight"], plan.B._parameters["weight"]
        if (
            not takes_input(x, weight, bias)
            or A.dtype not in _FACTOR_DTYPES
            or A.dtype is not B.dtype
        ):
            return None
        dropout = plan.dropout
        p = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
        if p and torch.compiler.is_compiling():
            return None  # a seed is a Python number, which would break the graph
        lora = LoRA(A, B, self.scaling[plan.name], p, draw_seed() if p else 0)
        return Frozen(weight.t() if plan.transposed else weight, bias, lora)

    def peftkit_verdict(self) -> tuple[str, str]:
        """The path a forward takes in the present state, and the reason where it is PEFT's own."""
        reason = obstacle(self)
        if reason:
            return "peft", reason
        weight, rank = self.get_base_layer().weight, self.r[self.active_adapters[0]]
        return f"fused:{choose_backend('lora_linear', 'auto', weight, rank=rank)}", ""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by a function: this class goes by the name of PEFT's."""
        state = {key: value for key, value in self.__dict__.items() if key != "_peftkit_plan"}
        return _new_layer, (), state

    def _is_current(self, plan: _Plan) -> bool:
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
        )

    def _is_open(self, plan: _Plan) -> bool:
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
        return (
            "weight" in base._parameters and "weight" in A._parameters and "weight" in B._parameters
        )

    def _make_plan(self) -> _Plan:
        active = (
            self._active_adapter
            if isinstance(self._active_adapter, str)
            else list(self._active_adapter)
        )
        if state_obstacle(self) or class_obstacle(self):
            return _Plan(active, "", *[None] * 4, False)
        name = next(name for name in self.active_adapters if name in self.lora_A)
        transposed = type(self.base_layer) is not nn.Linear
        return _Plan(
            active,
            name,
            self.base_layer,
            self.lora_A[name],
            self.lora_B[name],
            self.lora_dropout[name],
            transposed,
        )


def _new_layer() -> FusedLinear:
    return FusedLinear.__new__(FusedLinear)


def _dropping_plan(method: str) -> Any:
    """PEFT's method, after which the layer looks again at what it may do."""

    @functools.wraps(getattr(Linear, method))
    def call(self: FusedLinear, *args: Any, **kwargs: Any) -> Any:
        vars(self).pop("_peftkit_plan", None)
        try:
            return getattr(super(FusedLinear, self), method)(*args, **kwargs)
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
    setattr(FusedLinear, _method, _dropping_plan(_method))

# PEFT finds and reports layers by class name: "all-linear" looks for "Linear" in it
FusedLinear.__name__ = FusedLinear.__qualname__ = "Linear"


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
    return x.dtype is weight.dtype or torch.is_autocast_enabled(x.device.type)


def frozen_part(module: nn.Module, x: Tensor) -> Frozen | None:
    """A fused LoRA layer or a plain frozen ``nn.Linear`` as tensors, or ``None`` where neither applies."""
    if isinstance(module, FusedLinear):
        return None if has_hooks(module) else module.frozen_linear(x)
    if type(module) is not nn.Linear or has_hooks(module) or "weight" not in module._parameters:
        return None
    return (
        Frozen(module.weight, module.bias, None)
        if takes_input(x, module.weight, module.bias)
        else None
    )


def fuse_layer(module: nn.Module) -> bool:
    """Give one PEFT LoRA layer its fused forward; ``False`` where there is none for its class."""
    if type(module) is not Linear or class_obstacle(module):
        return False
    module.__class__ = FusedLinear
    return True


def restore_layer(module: nn.Module) -> None:
    """Make a fused layer PEFT's own again."""
    if type(module) is FusedLinear:
        vars(module).pop("_peftkit_plan", None)
        vars(module).pop("_peftkit_group", None)
        module.__class__ = Linear  # pyright: ignore[reportAttributeAccessIssue] - its base class
