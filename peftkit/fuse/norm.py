"""RMSNorm and LayerNorm with frozen parameters, each as one op. ``peftkit.fuse.recognise`` finds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftkit.find.targets import is_own_adapter
from peftkit.fuse.plan import Fused, Reason, decline, forget_declined
from peftkit.fuse.recognise import NormFormula, seal_norm
from peftkit.fuse.seal import Seal
from peftkit.swap import swap_in, swap_out
from peftkit_kernels.core.checks import is_autocast_enabled
from peftkit_kernels.core.dispatch import choose_backend, is_transformed
from peftkit_kernels.ops.frozen_norm import frozen_layer_norm, frozen_rms_norm
from peftkit_kernels.ops.frozen_norm.config import obstacle

METHOD = "frozen norm"

_OVER_OTHER_AXES = nn.modules.batchnorm._NormBase, nn.GroupNorm
"""Torch's norms that never normalise over the last axis alone. They are not examined and have no row in the report."""

_TRAINED = Reason("its weight or bias is trained, and the fused norm computes no gradient for them")


class FusedNorm(Fused):
    """The fused forward of a norm with frozen parameters; mixed into the module's own class."""

    _peftkit_seal: Seal

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The norm over the last axis of ``x [..., K]``; the module's own forward if ``peftkit_plan`` gives a reason."""
        # torch.compile traces the module's own operations; it could not trace the plan.
        if len(args) != 1 or kwargs or is_transformed():
            return super().forward(*args, **kwargs)
        parts = self.peftkit_plan(args[0])
        if isinstance(parts, Reason):
            return super().forward(*args)
        return _apply(args[0], *parts)

    def peftkit_plan(self, x: Any) -> tuple[Tensor, Tensor | None, NormFormula] | Reason:
        """Weight, bias and formula of a forward on ``x``, or why the module's own forward runs."""
        seal = self._peftkit_seal
        broken = seal.broken(self)
        if broken is not None:
            return broken
        formula: NormFormula = seal.answer
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        if weight is None:
            return Reason("its weight is computed (parametrised or offloaded), not a parameter")
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return _TRAINED
        for parameter in (weight, bias):
            if type(parameter) not in (nn.Parameter, Tensor, type(None)):
                return Reason(f"its parameters are stored as {type(parameter).__name__}")
        if weight.shape != (formula.width,) or (bias is not None) is not formula.has_bias:
            return Reason("its weight or bias was replaced by one of another shape")
        return _input_reason(x, weight, formula) or (weight, bias, formula)

    def peftkit_example(self) -> Tensor:
        """One row of ones with the width, dtype and device of the weight."""
        weight = self._parameters.get("weight")
        return torch.ones(1, 1) if weight is None else weight.detach().new_ones(1, weight.shape[0])

    @property
    def peftkit_method(self) -> str:
        """The name of the method in the report of ``explain``."""
        formula = self._peftkit_seal.answer
        is_layer = isinstance(formula, NormFormula) and formula.kind == "layer"
        return "frozen LayerNorm" if is_layer else "frozen RMSNorm"

    def peftkit_backend(self, x: Tensor, parts: tuple[Tensor, Tensor | None, NormFormula]) -> str:
        """``"torch"`` or ``"triton"``."""
        weight, bias, formula = parts
        op = f"frozen_{formula.kind}_norm"
        own = obstacle(op, weight.shape[0])
        return choose_backend(op, "auto", x, weight, bias, has_dot=False, own_obstacle=own)


def fuse_norms(model: nn.Module) -> int:
    """Fuse every frozen norm with a known formula; returns the number of newly fused norms. Others keep a reason.

    The norms inside adapters are not fused, so that an adapter computes the same bits in training and after loading.
    """
    count = 0
    own = {id(part) for m in model.modules() if is_own_adapter(m) for part in m.modules()}
    for module in list(model.modules()):
        if "norm" not in type(module).__name__.lower() or id(module) in own:
            continue
        if isinstance(module, _OVER_OTHER_AXES):
            continue
        is_fused = isinstance(module, FusedNorm)
        if is_fused and module._peftkit_seal.broken(module) is None:
            continue
        seal = _seal_or_reason(module)
        if isinstance(seal, Seal):
            forget_declined(module)
            if not is_fused:
                swap_in(module, FusedNorm)
                count += 1
            module.__dict__["_peftkit_seal"] = seal
            continue
        if is_fused:
            swap_out(module, FusedNorm)
        if seal is not None:
            decline(module, METHOD, seal)
    return count


def _seal_or_reason(module: nn.Module) -> Seal | Reason | None:
    """The seal of a norm to fuse, the reason why it is not fused, or ``None`` for a module without a weight per feature."""
    if "parametrizations" in module._modules:
        return seal_norm(module).answer
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or weight.shape[0] == 1:
        return None
    if "forward" in module.__dict__:
        return Reason("its forward is replaced on this module")
    if any(parameter.requires_grad for parameter in module.parameters()):
        return _TRAINED
    seal = seal_norm(module)
    formula = seal.answer
    if isinstance(formula, Reason):
        return formula
    return seal if weight.dtype in formula.dtypes else _other_casts(weight.dtype)


def _other_casts(dtype: torch.dtype) -> Reason:
    return Reason(f"on {dtype} its forward casts in another order than the fused norm")


def _input_reason(x: Any, weight: Tensor, formula: NormFormula) -> Reason | None:
    """Why the module's own forward runs on this input, or ``None``."""
    if not isinstance(x, Tensor) or not x.dim() or x.shape[-1] != weight.shape[0]:
        return Reason("its input is not as wide as its weight")
    if x.dtype is not weight.dtype:
        return Reason(f"its input is {x.dtype} and its weight {weight.dtype}")
    if x.device != weight.device:
        return Reason(f"its input is on {x.device} and its weight on {weight.device}")
    if x.dtype not in formula.dtypes:
        return _other_casts(x.dtype)
    if not formula.in_autocast and x.dtype.itemsize == 2 and is_autocast_enabled(x.device.type):
        return Reason("autocast is on, which may compute this function of torch in float32")
    return None


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None, formula: NormFormula) -> Tensor:
    if formula.kind == "layer":
        return frozen_layer_norm(x, weight, bias, formula.eps)
    offset, round_first = formula.offset, formula.round_first
    return frozen_rms_norm(x, weight, formula.eps, offset=offset, round_first=round_first)
