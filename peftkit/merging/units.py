"""The layers that hold adapters: the weights that PEFT merges them into, one layer at a time and in float32, and what cannot be merged."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from peftkit.errors import ContractError, listing
from peftkit.find.stacks import packed_stacks


def is_unit(module: nn.Module) -> bool:
    """Whether a module is one that PEFT puts around a layer of the base: an adapter layer, a trained head, or trained tokens."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def units_of(base: nn.Module) -> dict[str, Any]:
    """The outermost layers with adapters of a base model, by the name of the layer that they are around."""
    return {name: module for name, module in walk(base) if is_unit(module)}


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield modules with their names, like ``named_modules(remove_duplicate=False)``.

    Modules inside layers with adapters are left out, and those by which bitsandbytes decodes stacks of experts.
    """
    yield prefix, module
    if is_unit(module):
        return
    hidden = "parametrizations" if packed_stacks(module) else None
    for name, child in module.named_children():
        if name == hidden:
            continue
        yield from walk(child, f"{prefix}.{name}" if prefix else name)


def base_module(unit: Any) -> nn.Module:
    """Return the layer of the base model that a layer with adapters is around."""
    module = unit
    while is_unit(module):
        if hasattr(module, "original_module"):
            module = module.original_module
        elif hasattr(module, "token_adapter"):
            module = module.token_adapter.base_layer
        else:
            module = module.base_layer
    return module


def require_mergeable(model: Any, units: dict[str, Any]) -> list[str]:
    """Check that the active adapters can be merged.

    Args:
        model: A ``PeftModel``, or a transformers model with adapters.
        units: The result of ``units_of``.

    Returns:
        The names of the active adapters.

    Raises:
        ContractError: The model has no adapter, adapters are disabled or merged already, or the method cannot be merged.
    """
    configs = getattr(model, "peft_config", None) or {}
    active = _active(model, units)
    for name in active:
        config = configs.get(name)
        if config is not None and getattr(config, "is_prompt_learning", False):
            raise ContractError(
                f"adapter {name!r} ({_method(config)}) cannot be merged: it adds virtual tokens and changes no weight; keep it as "
                "an adapter, or train LoRA if the model has to be merged"
            )
    tuner = getattr(model, "base_model", None)
    if hasattr(tuner, "_check_merge_allowed"):
        try:
            with warnings.catch_warnings():
                # PEFT warns about adapters on tied embeddings; the files get separate ones
                warnings.filterwarnings(
                    "ignore", message=".*tied_target_modules", category=UserWarning
                )
                tuner._check_merge_allowed()
        except (ValueError, NotImplementedError) as error:
            methods = ", ".join(sorted({_method(configs[name]) for name in active}))
            raise ContractError(f"the adapter ({methods}) cannot be merged: {error}") from error
    if not units:
        raise ContractError(
            "the model has no adapter layers, so there is nothing to merge; load the adapter with peftkit.load_adapter"
        )
    _require_state(units)
    return active


def _require_state(units: dict[str, Any]) -> None:
    merged = [name for name, unit in units.items() if getattr(unit, "merged", False)]
    if merged:
        raise ContractError(
            f"adapters are merged into {len(merged)} layers already, which rounded their weights:\n{listing(merged)}\n"
            "Call model.unmerge_adapter() first, or better load the model and the adapter again."
        )
    disabled = [name for name, unit in units.items() if _is_disabled(unit)]
    if disabled:
        raise ContractError(
            f"adapters are disabled in {len(disabled)} layers:\n{listing(disabled)}\n"
            "Call merge outside of disable_adapter(), or call model.base_model.enable_adapter_layers()."
        )


def _is_disabled(unit: Any) -> bool:
    return bool(getattr(unit, "disable_adapters", False))


def _active(model: Any, units: dict[str, Any]) -> list[str]:
    active = getattr(model, "active_adapters", None)
    if callable(active):
        try:
            active = active()
        except ValueError:  # transformers raises it for a model without adapters
            active = []
    if not active:
        names = [name for unit in units.values() for name in getattr(unit, "active_adapters", [])]
        active = list(dict.fromkeys(names))
    return [active] if isinstance(active, str) else list(active)


def _method(config: Any) -> str:
    kind = config.peft_type
    return str(getattr(kind, "value", kind))


def merged_module(unit: Any, dense: dict[int, nn.Module], name: str) -> nn.Module:
    """Merge the active adapters of a layer by PEFT's arithmetic, in a copy of the layer.

    Args:
        unit: A layer with adapters whose tensors are float32; not changed.
        dense: For modules inside the unit, by their ``id``: the module that the copy has in their place.
        name: The name of the layer, for errors.

    Returns:
        The plain layer with merged weights.

    Raises:
        ContractError: PEFT cannot merge this layer.
    """
    copied = copy.deepcopy(unit, dict(dense))
    try:
        if hasattr(copied, "unload_and_optionally_merge_module"):
            return copied.unload_and_optionally_merge_module(
                merge=True, safe_merge=False, adapter_names=None
            )
        # a layer that has adapters of two methods is a layer around a layer
        layer = copied
        while is_unit(layer):
            layer.merge(safe_merge=False, adapter_names=None)
            layer = layer.base_layer
        return layer
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise ContractError(
            f"PEFT cannot merge the adapter of {name} ({kind_of(unit)}): {error}"
        ) from error


def plain_copy(unit: Any, dense: dict[int, nn.Module]) -> nn.Module:
    """Copy the layer of the base model that a layer with adapters is around. Arguments as for ``merged_module``."""
    return copy.deepcopy(base_module(unit), dict(dense))


def kind_of(unit: Any) -> str:
    """The method of a layer with adapters, such as ``lora.Linear`` or ``ModulesToSaveWrapper``."""
    cls = type(unit)
    if cls.__module__.startswith("peft.tuners."):
        return f"{cls.__module__.split('.')[2]}.{cls.__name__}"
    return cls.__name__


def set_enabled(base: nn.Module, enabled: bool) -> None:
    """Enable or disable the adapters of a model in every layer."""
    for unit in units_of(base).values():
        for part in unit.modules():
            if is_unit(part):
                part.enable_adapters(enabled)
