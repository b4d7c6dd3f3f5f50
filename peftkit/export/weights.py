"""The weights of a model with its adapters merged, one tensor at a time; the model itself stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.base.storage import storage_of
from peftkit.errors import ContractError
from peftkit.find.modules import is_quantised


@dataclass(frozen=True)
class Weight:
    """One tensor of the merged model.

    Attributes:
        name: Its name in the base model.
        shape: Its shape.
        load: Computes it, in float32 if an adapter was merged and otherwise in the dtype of the model.
        source: The parameter of the base model, to recognise tied weights.
        is_merged: Whether an adapter changes it.
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]
    source: Any
    is_merged: bool


def merged_weights(model: nn.Module) -> list[Weight]:
    """The weights of a model, with the active adapters of PEFT merged.

    Args:
        model: A model, or a ``PeftModel`` around it. Disabled adapters are left out.

    Raises:
        ContractError: An adapter cannot be merged (prefixes, bottlenecks, prompts).
    """
    from peft import PeftModel

    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise ContractError(
                f"peft_type={model.active_peft_config.peft_type!s}: a prompt is not part of the weights and cannot be "
                "exported"
            )
        model = model.get_base_model()
    return list(_walk(model, ""))


def _walk(module: nn.Module, name: str) -> Iterator[Weight]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    prefix = f"{name}." if name else ""
    if isinstance(module, ModulesToSaveWrapper):
        chosen = module.original_module
        if not module.disable_adapters and module.active_adapters:
            chosen = module.modules_to_save[module.active_adapters[0]]
        yield from _walk(chosen, name)
    elif isinstance(module, TrainableTokensWrapper):
        yield from _adapted(module.token_adapter, prefix)
    elif isinstance(module, BaseTunerLayer):
        if not hasattr(module, "base_layer"):
            raise ContractError(
                f"{name}: {type(module).__name__} is not linear in the layer's input, so it is not part of the weights and cannot "
                "be exported; export the base model, or an adapter of LoRA"
            )
        yield from _adapted(module, prefix)
    else:
        for own, parameter in module._parameters.items():
            if parameter is not None:
                yield _weight(f"{prefix}{own}", module, own, parameter)
        for child, inner in module.named_children():
            yield from _walk(inner, f"{prefix}{child}")


def _adapted(layer: Any, prefix: str) -> Iterator[Weight]:
    """The weights of an adapted layer."""
    base = layer.get_base_layer()
    active = [] if layer.disable_adapters or layer.merged else list(layer.active_adapters)
    for own, parameter in base._parameters.items():
        if parameter is None:
            continue
        if not active:
            yield _weight(f"{prefix}{own}", base, own, parameter)
            continue
        shape = _shape(base, own, parameter)
        load = (lambda n: lambda: _merge(layer, base, n, f"{prefix}{n}"))(own)
        yield Weight(f"{prefix}{own}", shape, load, parameter, True)


def _weight(name: str, module: nn.Module, own: str, parameter: Tensor) -> Weight:
    shape = _shape(module, own, parameter)
    return Weight(name, shape, lambda: _dequantized(module, own), parameter, False)


def _is_quantized(module: nn.Module, own: str) -> bool:
    return own == "weight" and is_quantised(module._parameters[own])


def _shape(module: Any, own: str, parameter: Tensor) -> tuple[int, ...]:
    if _is_quantized(module, own):
        return (module.out_features, module.in_features)
    return tuple(parameter.shape)


@torch.no_grad()
def _dequantized(module: nn.Module, own: str) -> Tensor:
    if _is_quantized(module, own):
        state: Any = getattr(module.weight, "quant_state", None)
        stored = storage_of(module) if getattr(state, "quant_type", None) == "nf4" else None
        if stored is not None:
            # on some CPUs bitsandbytes itself decodes rows wrongly that are not whole blocks
            return stored.dense().to(state.dtype)
        from peft.utils.integrations import dequantize_module_weight

        return dequantize_module_weight(module).detach()
    return module._parameters[own].detach()


@torch.no_grad()
def _merge(layer: Any, base: nn.Module, own: str, name: str) -> Tensor:
    """One parameter of the layer with its adapters merged in float32. Afterwards the layer is as before."""
    if _is_quantized(base, own):
        return _merge_quantized(layer, base, name)
    before = {n: p.data for n, p in base._parameters.items() if p is not None}
    try:
        for n, data in before.items():
            base._parameters[n].data = data.to(torch.float32, copy=True)
        layer.merge(adapter_names=list(layer.active_adapters))
        return base._parameters[own].data
    except (NotImplementedError, ValueError) as error:
        raise ContractError(f"{name}: its adapter cannot be merged ({error})") from error
    finally:
        for n, data in before.items():
            base._parameters[n].data = data
        layer.merged_adapters.clear()


def _merge_quantized(layer: Any, base: nn.Module, name: str) -> Tensor:
    weight = _dequantized(base, "weight").float()
    for adapter in layer.active_adapters:
        if adapter in getattr(layer, "lora_variant", {}) or not hasattr(layer, "get_delta_weight"):
            raise ContractError(
                f"{name}: only plain LoRA on a quantised weight can be merged; load the base model without quantisation"
            )
        if adapter in layer.lora_A:
            weight += layer.get_delta_weight(adapter).float()
    return weight
