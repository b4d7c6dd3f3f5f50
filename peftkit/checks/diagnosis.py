"""Find out why a loss is not finite, or why a gradient is missing or zero, by a second pass with hooks on the modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.checks.adapters import AdapterTensor, trained_copies, tuner_layers
from peftkit.find.modules import is_quantised

_LAYER_DROP = (
    "layerdrop",
    "encoder_layerdrop",
    "decoder_layerdrop",
    "drop_path_rate",
    "stochastic_depth_prob",
)


def first_non_finite_module(model: nn.Module, forward: Callable[[], Any]) -> str:
    """Find the first module, in the order of completion, whose output is not finite.

    Args:
        model: The model.
        forward: Runs one forward of the model.

    Returns:
        A sentence that names the module, and a parameter of the module that is not finite if there is one.
    """
    found: dict[str, str] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if "nan" not in found and bool(tensor.isnan().any()):
                    found["nan"] = name
                elif "inf" not in found and bool(tensor.isinf().any()):
                    found["inf"] = name

        return hook

    handles = [
        module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    # Masks may rightly have infinite values, but nothing may have a NaN.
    name = found.get("nan", found.get("inf"))
    if name is None:
        return "all modules have finite outputs, so check the labels and the loss function"
    kind = "NaN" if "nan" in found else "infinite values"
    culprit = model.get_submodule(name)
    broken = [
        n
        for n, p in culprit.named_parameters()
        if not is_quantised(p) and not bool(p.isfinite().all())
    ]
    if broken:
        return f"{name}.{broken[0]} has NaN or infinite values; load the model or the adapter again"
    return (
        f"the first {kind} occurred in the output of {name} ({type(culprit).__name__}), whose own weights are finite; check "
        "its input, and use bfloat16 or float32 if the model runs in float16"
    )


@dataclass
class _Seen:
    """Observations of one tuner layer, or of one copy for ``modules_to_save``, in one forward and backward."""

    called: bool = False
    positions: int | None = None
    input_is_zero: bool = True
    reached: bool = False
    incoming: float = 0.0
    """Norm of the gradient at the layer's output."""
    noise: float = 0.0
    """A gradient smaller than this fraction of other layers' gradients may consist of rounding errors: ``2 N eps``."""
    cancels: bool = True
    """Whether the gradients of all rows of the output add up to zero, up to rounding."""


@dataclass(frozen=True)
class Verdict:
    """Why tensors get no gradient.

    Attributes:
        faults: The reason for each tensor that should get a gradient, by name.
        advice: What to do about each fault, by name.
        notes: Notes on tensors that rightly get no gradient.
    """

    faults: dict[str, str]
    advice: dict[str, str]
    notes: list[str]


def why_no_gradient(
    model: nn.Module,
    doubtful: dict[str, AdapterTensor],
    missing: set[str],
    step: Callable[[], None],
) -> Verdict:
    """Explain missing and zero gradients.

    Args:
        model: The model.
        doubtful: The tensors to explain, by name.
        missing: Names of the tensors whose gradient is ``None``.
        step: Runs one forward and backward.
    """
    seen: dict[str, _Seen] = {}
    handles = []
    layers = tuner_layers(model) | trained_copies(model)
    for name, layer in layers.items():
        seen[name] = _Seen()
        # This hook runs before all others, so that the gradient includes changes that other hooks make to the output.
        handles.append(
            layer.register_forward_hook(_record(seen[name]), with_kwargs=True, prepend=True)
        )
    try:
        step()
    finally:
        for handle in handles:
            handle.remove()

    faults, advice, notes = {}, {}, []
    surroundings = _Surroundings(layers, seen, doubtful)
    for name, t in doubtful.items():
        excuse = _excuse(model, t, layers.get(t.layer), seen.get(t.layer), surroundings)
        if excuse:
            notes.append(f"{name}: no gradient, because {excuse}")
        else:
            reason, advice[name] = _fault(name, t, seen, missing)
            faults[name] = f"{name}: {reason}"
    return Verdict(faults, advice, notes)


class _Surroundings:
    """Observations of the layers with the same parent, and of the other experts; computed once for all layers."""

    def __init__(
        self,
        layers: dict[str, nn.Module],
        seen: dict[str, _Seen],
        doubtful: dict[str, AdapterTensor],
    ):
        idle = {t.layer for t in doubtful.values()}
        self._busy_experts = {_experts_of(name) for name in layers if name not in idle}
        self._beside: dict[str, list[_Seen]] = {}
        for name, what in seen.items():
            self._beside.setdefault(name.rpartition(".")[0], []).append(what)

    def other_experts_ran(self, layer: str) -> bool:
        """Whether the layer belongs to an expert, and another expert of the same block got a gradient."""
        return ".experts." in layer and _experts_of(layer) in self._busy_experts

    def beside(self, layer: str) -> list[_Seen]:
        """Return the observations of the layers with the same parent, including this layer."""
        return self._beside[layer.rpartition(".")[0]]


def _experts_of(layer: str) -> str:
    return layer.partition(".experts.")[0]


def _record(seen: _Seen) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.called = True
        first = next(iter(_tensors((args, kwargs))), None)
        if first is not None:
            seen.input_is_zero &= not bool(first.any())
            seen.positions = first.shape[-2] if first.ndim > 2 else None

        def arrive(gradient: Tensor) -> None:
            seen.reached = True
            seen.incoming += gradient.float().norm().item()
            eps = torch.finfo(gradient.dtype).eps
            seen.noise = 2 * gradient.shape[-1] * eps
            rows = gradient.float().reshape(-1, gradient.shape[-1])
            allowed = len(rows) * eps * rows.abs().sum(0)
            seen.cancels &= bool((rows.sum(0).abs() <= allowed).all())

        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(arrive)

    return hook


def _excuse(
    model: nn.Module,
    t: AdapterTensor,
    layer: nn.Module | None,
    what: _Seen | None,
    surroundings: _Surroundings,
) -> str:
    """Return why this tensor rightly gets no gradient, or an empty string."""
    if "trainable_tokens" in t.role:
        return "none of its tokens occurs in the batch"
    if layer is None or what is None:
        return ""
    if surroundings.other_experts_ran(t.layer):
        return "no token of the batch was routed to its expert"
    if not what.called:
        rate = max((getattr(model.config, key, None) or 0.0 for key in _LAYER_DROP), default=0.0)
        return "its layer was dropped at random" if model.training and rate > 0 else ""
    if getattr(layer, "scaling", {}).get(t.adapter, 1.0) == 0:
        return "the adapter's scale is 0"
    dropout = getattr(layer, "lora_dropout", {})
    if layer.training and t.adapter in dropout and getattr(dropout[t.adapter], "p", 0.0) >= 1.0:
        return "the adapter's dropout is 1"
    if what.input_is_zero:
        return "the layer's input is zero"
    if t.role.endswith("bias") and what.incoming > 0 and what.cancels:
        return "the gradients at its layer's output cancel, as those of a softmax over positions do"
    beside = surroundings.beside(t.layer)
    negligible = what.incoming <= what.noise * max(other.incoming for other in beside)
    if what.reached and negligible and any(other.positions == 1 for other in beside):
        return "attention over a single position does not depend on queries and keys"
    return ""


def _fault(
    name: str, t: AdapterTensor, seen: dict[str, _Seen], missing: set[str]
) -> tuple[str, str]:
    """Return what is wrong, and what to do."""
    what = seen.get(t.layer)
    if what is None or not what.called:
        return (
            "the forward of this batch did not use it",
            "Exclude modules that your data never uses (exclude_modules), or pass a batch that uses them.",
        )
    if name in missing and not what.reached:
        return (
            "the loss does not depend on the output of its layer (detached, or unused)",
            "Look for detach(), torch.no_grad() or an unused output in the model's code and hooks, or exclude these modules "
            "(exclude_modules).",
        )
    if name in missing:
        return (
            "its layer ran but did not use it (is the adapter active in this layer?)",
            "Call model.set_adapter with the adapter's name, and look for detach() inside the layer.",
        )
    if what.incoming == 0:
        return (
            "the gradient at the output of its layer is exactly zero",
            "Look for a factor of zero between this layer and the loss: masks, gates, hooks, or underflow in float16.",
        )
    return (
        "its gradient is exactly zero, but the gradient at its layer's output is not (underflow in float16?)",
        "Use float32 or bfloat16 for the adapter's weights, or multiply the loss by a factor before the backward.",
    )


def _tensors(value: Any) -> list[Tensor]:
    """Return the floating-point tensors in a nested value."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]
