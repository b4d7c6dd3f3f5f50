"""What adapters a model carries, tensor by tensor, whatever PEFT method they belong to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class AdapterTensor:
    """One parameter of one adapter.

    Attributes:
        name: Its name in the model.
        layer: Name of the tuner layer or wrapper that owns it.
        role: Its name within the layer, without the adapter's name: ``"lora_A.weight"``.
        adapter: The adapter's name; empty where the method keeps one set for all.
        tensor: The parameter.
    """

    name: str
    layer: str
    role: str
    adapter: str
    tensor: Tensor


def adapter_tensors(model: nn.Module) -> list[AdapterTensor]:
    """Every parameter that belongs to an adapter, the copies made for ``modules_to_save`` included."""
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
        if isinstance(module, AuxiliaryTrainingWrapper):
            foreign = "original_module."
        elif isinstance(module, BaseTunerLayer):
            foreign = "base_layer."
        elif layer == "prompt_encoder":
            foreign = None
        else:
            continue
        for own, tensor in module.named_parameters():
            inside_other = foreign is not None and own.startswith(foreign)
            if not inside_other and id(tensor) not in seen:
                seen.add(id(tensor))
                yield layer, own, tensor


def tuner_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The PEFT tuner layers of a model by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that a forward uses, as PEFT's or transformers' model reports them."""
    active = model.active_adapters
    active = active() if callable(active) else active
    return [active] if isinstance(active, str) else list(active)
