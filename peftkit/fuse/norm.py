"""Frozen RMSNorm and LayerNorm: found by structure, accepted when the fused formula gives the module's own output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftkit.find.targets import is_own_adapter
from peftkit.fuse._tmp_rounding import same_up_to_rounding
from peftkit.fuse.recognise import probe_input
from peftkit.fuse.adapter import has_hooks
from peftkit.swap import swap_in
from peftkit_kernels.dispatch import choose_backend, is_transformed
from peftkit_kernels.frozen_norm import frozen_layer_norm, frozen_rms_norm
from peftkit_kernels.frozen_norm.config import obstacle

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")


class FusedNorm(nn.Module):
    """Forward of a norm whose parameters are frozen; mixed into the module's own class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The norm over the last axis of the one argument; the module's own where its weight is trained or it gets more."""
        weight, bias = self._parameters["weight"], self._parameters.get("bias")
        if len(args) != 1 or kwargs or weight is None or is_transformed():
            return super().forward(*args, **kwargs)
        x = args[0]
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if trained or x.dtype is not weight.dtype or x.device != weight.device:
            return super().forward(x)
        return _apply(self._peftkit_norm, x, weight, bias)

    @property
    def peftkit_method(self) -> str:
        """What ``explain`` calls it."""
        return "frozen LayerNorm" if self._peftkit_norm["kind"] == "layer" else "frozen RMSNorm"

    def peftkit_verdict(self) -> tuple[str, str]:
        """The path a forward takes in the present state, and the reason where it is the module's own."""
        if any(parameter.requires_grad for parameter in self.parameters()):
            return "peft", "its weight is trained"
        weight = self._parameters["weight"]
        op = f"frozen_{self._peftkit_norm['kind']}_norm"
        own = obstacle(op, weight.shape[0])
        backend = choose_backend(op, "auto", weight, has_dot=False, own_obstacle=own)
        return f"fused:{backend}", ""


def fuse_norms(model: nn.Module) -> int:
    """Fuse every norm that one of the known formulas reproduces; returns their number.

    Those of adapters stay torch's, so that an adapter computes the same bits while it is trained and after it is loaded.
    """
    count = 0
    own = {id(part) for m in model.modules() if is_own_adapter(m) for part in m.modules()}
    for module in list(model.modules()):
        if isinstance(module, FusedNorm) or id(module) in own:
            continue
        formula = _formula(module)
        if formula is not None:
            swap_in(module, FusedNorm)
            module.__dict__["_peftkit_norm"] = formula
            count += 1
    return count


def _formula(module: nn.Module) -> dict[str, Any] | None:
    weight = module._parameters.get("weight")
    eps = next((getattr(module, name) for name in _EPS_NAMES if hasattr(module, name)), None)
    if (
        "Norm" not in type(module).__name__
        or weight is None
        or weight.dim() != 1
        or not isinstance(eps, float)
    ):
        return None
    if (
        set(module._parameters) - {"weight", "bias"}
        or module._modules
        or module._buffers
        or has_hooks(module)
    ):
        return None
    if weight.device.type == "meta" or weight.requires_grad or not weight.is_floating_point():
        return None
    bias = module._parameters.get("bias")
    if type(module) is nn.LayerNorm:
        return {"kind": "layer", "eps": eps} if len(module.normalized_shape) == 1 else None
    if bias is not None:
        return None
    x = probe_input((2, weight.shape[0]), weight)
    with torch.no_grad():
        try:
            own = module(x)
        except (TypeError, RuntimeError):
            return None  # not a norm over the last axis of one input
        for offset in (0.0, 1.0):
            for round_first in (True, False):
                formula = {"kind": "rms", "eps": eps, "offset": offset, "round_first": round_first}
                if _matches(formula, own, x, weight):
                    return formula
    return None


def _matches(formula: dict[str, Any], own: Any, x: Tensor, weight: Tensor) -> bool:
    return isinstance(own, Tensor) and same_up_to_rounding(_apply(formula, x, weight, None), own)


def _apply(formula: dict[str, Any], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if formula["kind"] == "layer":
        return frozen_layer_norm(x, weight, bias, formula["eps"])
    return frozen_rms_norm(
        x, weight, formula["eps"], offset=formula["offset"], round_first=formula["round_first"]
    )
