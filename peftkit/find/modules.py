"""Iterate over the modules of a model, with the names that they have without adapters."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the original modules of a model, with the names that they have without adapters."""
    return ((name, inner) for name, _, inner in wrapped_modules(model))


def wrapped_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield the name of each module without adapters, the module that is called, and the original module inside it.

    The two modules differ if PEFT has wrapped the original. Modules of adapters are left out.
    """
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        name, outer = waiting.pop()
        inner = without_adapters(outer)
        if id(inner) in seen or is_own_adapter(inner):
            continue
        seen.add(id(inner))
        yield name, outer, inner
        before = f"{name}." if name else ""
        children = [
            (before + own, child) for own, child in inner._modules.items() if child is not None
        ]
        waiting.extend(reversed(children))


def is_own_adapter(module: nn.Module) -> bool:
    """Whether this is a prefix or bottleneck module of peftkit. Such a module is a child of a module, and does not wrap it."""
    return getattr(type(module), "peftkit_adapter", False) is True


def is_adapted(module: nn.Module) -> bool:
    """Whether this is an adapter: a layer in which PEFT has wrapped a module, or a prefix or bottleneck of peftkit."""
    return isinstance(module, _adapter_classes()) or is_own_adapter(module)


def without_adapters(module: nn.Module) -> nn.Module:
    """Return the original module inside PEFT's layers, or the module itself."""
    layer, wrapper = _adapter_classes()
    while isinstance(module, (layer, wrapper)):
        inner = "original_module" if isinstance(module, wrapper) else "base_layer"
        if inner not in module._modules:
            break
        module = module.get_submodule(inner)
    return module


@functools.cache
def _adapter_classes() -> tuple[type, type]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    return BaseTunerLayer, AuxiliaryTrainingWrapper


def is_linear_like(module: nn.Module) -> bool:
    """Whether the module multiplies its input by one matrix: ``nn.Linear``, transformers' ``Conv1D``, a quantised linear."""
    if isinstance(module, nn.Linear):
        return True
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return True
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if not all(isinstance(size, int) for size in sizes) or len(module._modules) > 0:
        return False
    weight = getattr(module, "weight", None)
    if weight is None:
        return any(hasattr(module, name) for name in ("qweight", "W_q", "weight_packed"))
    return getattr(weight, "ndim", 0) <= 2


def is_quantised(weight: Tensor) -> bool:
    """Whether the elements of a weight are codes: integers, or floating-point numbers of 8 bits, which need a scale."""
    return not weight.is_floating_point() or weight.dtype.itemsize == 1


def storage_of(weight: Tensor) -> Any:
    """Return a key for the memory of a weight. Tied weights have equal keys, even as different ``Parameter`` objects."""
    if weight.is_meta:
        return id(weight)
    # FSDP divides a weight: its own memory is that of this process's part.
    weight = getattr(weight, "_local_tensor", weight)
    storage = weight.untyped_storage()
    return (storage.data_ptr(), weight.storage_offset()) if storage.nbytes() else id(weight)


def ancestors(name: str) -> list[str]:
    """Return the names of all parents: ``"a.b.c"`` gives ``["a.b", "a"]``."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def suffixes(name: str) -> list[str]:
    """Return the entries by which PEFT matches a module: ``"a.b.c"`` gives ``["c", "b.c", "a.b.c"]``."""
    found, end = [], len(name)
    while (end := name.rfind(".", 0, end)) >= 0:
        found.append(name[end + 1 :])
    return [*found, name]
