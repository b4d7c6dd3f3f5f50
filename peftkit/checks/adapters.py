"""List the adapter tensors of a model, for every PEFT method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peftkit.find.targets import is_own_adapter


@dataclass(frozen=True)
class AdapterTensor:
    """One parameter of one adapter.

    Attributes:
        name: Its name in the model.
        layer: Name of the tuner layer or wrapper that owns it.
        role: Its name within the layer, without the adapter's name: ``"lora_A.weight"``.
        adapter: The adapter's name; empty if the method shares one tensor among all adapters.
        tensor: The parameter.
    """

    name: str
    layer: str
    role: str
    adapter: str
    tensor: Tensor


def adapter_tensors(model: nn.Module) -> list[AdapterTensor]:
    """Return every parameter of an adapter, including the copies made for ``modules_to_save``."""
    configs = getattr(model, "peft_config", None) or {}
    return [
        AdapterTensor(
            name=f"{layer}.{own}" if layer else own,
            layer=layer,
            role=".".join(part for part in own.split(".") if part not in configs),
            adapter=next((part for part in own.split(".") if part in configs), ""),
            tensor=tensor,
        )
        for layer, own, tensor in _owned(model)
    ]


def _owned(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    seen: set[int] = set()
    for layer, module in model.named_modules():
        wrapper = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        if not wrapper and layer != "prompt_encoder":
            continue
        beside = tuple(
            f"{name}."
            for name, inner in module.named_modules()
            if name and isinstance(inner, BaseTunerLayer) and is_own_adapter(inner)
        )
        for own, tensor in model.get_submodule(layer).named_parameters():
            original = {"base_layer", "original_module"} & {*own.split(".")}
            if not original and not own.startswith(beside) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield layer, own, tensor


def tuner_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the PEFT tuner layers of a model by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = dict(model.named_modules())
    return {name: modules[name] for name in modules if isinstance(modules[name], BaseTunerLayer)}


def trained_copies(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of which PEFT trains a copy (``modules_to_save``) by name."""
    from peft.utils import AuxiliaryTrainingWrapper

    return {n: m for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}


def active_adapters(model: nn.Module) -> list[str]:
    """Return the names of the adapters that a forward uses, as the PEFT or transformers model reports them."""
    active: Any = model.active_adapters
    active = active() if callable(active) else active
    return [active] if isinstance(active, str) else list(active)
