"""Checks that a failed call changes nothing: ``differences`` compares ``everything(model)`` before and after the call."""

from typing import Any

import torch
from torch import Tensor, nn


def everything(model: nn.Module) -> dict[str, Any]:
    """Identities, classes, attributes, flags and values of everything in a model, and torch's random state."""
    found: dict[str, Any] = {"random state": torch.get_rng_state().tolist()}
    for name, module in model.named_modules(remove_duplicate=False):
        where = f"module {name!r}"
        found[where] = (id(module), type(module), module.training, list(vars(module)))
        for key, value in vars(module).items():
            if not isinstance(value, (nn.Module, Tensor)):
                found[f"{where}, attribute {key}"] = _content(value)
    for kind, tensors in (("parameter", model.named_parameters), ("buffer", model.named_buffers)):
        for name, tensor in tensors(remove_duplicate=False):
            found[f"{kind} {name}"] = _identity(tensor)
            found[f"{kind} {name}, values"] = tensor.detach().clone()
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of everything that differs; empty if nothing changed."""
    assert len(before) > 3
    return [
        name
        for name in {**before, **after}
        if name not in before or name not in after or not _equal(before[name], after[name])
    ]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor) and not one.is_meta:
        return one.dtype == other.dtype and torch.equal(one, other)
    return isinstance(one, Tensor) or one == other


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    grad = tensor.grad if tensor.is_leaf else None
    memory = (tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride(), tensor.data_ptr())
    return (id(tensor), type(tensor), memory, tensor.requires_grad, id(grad), list(vars(tensor)))


def _content(value: Any) -> Any:
    """The content of a value if it can change in place, else its identity."""
    if isinstance(value, dict):
        return id(value), [(key, _content(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return id(value), [_content(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return id(value), sorted(map(repr, value))
    if hasattr(value, "to_dict"):  # a config of PEFT or transformers
        return id(value), sorted((key, repr(item)) for key, item in vars(value).items())
    return value if isinstance(value, (str, int, float, bool, type(None))) else id(value)
