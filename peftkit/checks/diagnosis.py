"""Why a loss is not finite, or a gradient missing or zero: a second pass with hooks on the modules in question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.checks.adapters import AdapterTensor, tuner_layers

_LAYER_DROP = (
    "layerdrop",
    "encoder_layerdrop",
    "decoder_layerdrop",
    "drop_path_rate",
    "stochastic_depth_prob",
)


def first_non_finite_module(model: nn.Module, forward: Callable[[], Any]) -> str:
    """Name the first module, in the order they finish, whose output is not finite, and a parameter to blame if there is one."""
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
    # Infinities are at home in masks; a NaN never is.
    name = found.get("nan", found.get("inf"))
    if name is None:
        return "all modules give finite outputs, so look at the labels and at the loss function"
    kind = "NaN" if "nan" in found else "infinite values"
    culprit = model.get_submodule(name)
    broken = [
        n
        for n, p in culprit.named_parameters()
        if p.is_floating_point() and not bool(p.isfinite().all())
    ]
    if broken:
        return (
            f"{name}.{broken[0]} holds NaN or infinite values: load the model or the adapter again"
        )
    return (
        f"the first {kind} came out of {name} ({type(culprit).__name__}), whose own weights are finite: look at its input, and "
        "use bfloat16 or float32 if the model runs in float16"
    )


@dataclass
class _Seen:
    """What one tuner layer did in one forward and backward."""

    called: bool = False
    positions: int | None = None
    input_is_zero: bool = True
    reached: bool = False
    incoming_is_zero: bool = True


def why_no_gradient(
    model: nn.Module,
    doubtful: dict[str, AdapterTensor],
    missing: set[str],
    zero: set[str],
    step: Callable[[], None],
) -> tuple[list[str], list[str]]:
    """Explain missing and zero gradients.

    Args:
        model: The model, undisturbed by the caller.
        doubtful: The tensors in question by name.
        missing: Names of tensors whose gradient is ``None``.
        zero: Names of tensors whose gradient is zero.
        step: One forward and backward.

    Returns:
        Faults (``name: reason``), and notes on those that are as they should be.
    """
    seen: dict[str, _Seen] = {}
    handles = []
    for name, layer in tuner_layers(model).items():
        seen[name] = _Seen()
        # First of all hooks: what others make of the output is then seen in its gradient.
        handles.append(
            layer.register_forward_hook(_record(seen[name]), with_kwargs=True, prepend=True)
        )
    try:
        step()
    finally:
        for handle in handles:
            handle.remove()

    faults, notes = [], []
    layers = tuner_layers(model)
    for name, t in doubtful.items():
        excuse = _excuse(model, name, t, layers, seen, doubtful)
        if excuse:
            notes.append(f"{name}: no gradient, because {excuse}")
        else:
            faults.append(f"{name}: {_fault(name, t, seen, missing)}")
    return faults, notes


def _record(seen: _Seen) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.called = True
        first = next(iter(_tensors((args, kwargs))), None)
        if first is not None:
            seen.input_is_zero &= not bool(first.any())
            seen.positions = first.shape[-2] if first.ndim > 2 else None

        def arrive(gradient: Tensor) -> None:
            seen.reached = True
            seen.incoming_is_zero &= not bool(gradient.any())

        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(arrive)

    return hook


def _excuse(
    model: nn.Module,
    name: str,
    t: AdapterTensor,
    layers: dict[str, nn.Module],
    seen: dict[str, _Seen],
    doubtful: dict[str, AdapterTensor],
) -> str:
    """Why this tensor rightly gets no gradient, or nothing."""
    layer, what = layers.get(t.layer), seen.get(t.layer)
    if "trainable_tokens" in t.role:
        return "none of its tokens occurs in the batch"
    if layer is None or what is None:
        return ""
    block = t.layer.partition(".experts.")[0] if ".experts." in t.layer else None
    if block is not None:
        fellows = {n for n in layers if n.startswith(f"{block}.experts.")}
        idle = {d.layer for d in doubtful.values()}
        if fellows - idle:
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
    siblings = [s for n, s in seen.items() if n.rpartition(".")[0] == t.layer.rpartition(".")[0]]
    if what.reached and what.incoming_is_zero and any(s.positions == 1 for s in siblings):
        return "attention over a single position does not depend on queries and keys"
    return ""


def _fault(name: str, t: AdapterTensor, seen: dict[str, _Seen], missing: set[str]) -> str:
    what = seen.get(t.layer)
    if what is None or not what.called:
        return "the forward of this batch never used it"
    if name in missing:
        return (
            "the output of its layer never reaches the loss (detached, or dropped)"
            if not what.reached
            else "its layer ran without it (is the adapter active in this layer?)"
        )
    if what.incoming_is_zero:
        return "the gradient that reaches its layer is exactly zero"
    return "its gradient is exactly zero although its layer's is not (underflow in float16?)"


def _tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors of a nested output."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]
