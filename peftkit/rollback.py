"""``restoring``: a block of code that changes a model either completes or leaves the model exactly as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_INITS_THAT_ONLY_READ = ("gaussian", "eva", "orthogonal", "mica")
_ATOMS = frozenset({str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device})


@contextmanager
def restoring(model: nn.Module, *, copy_values: bool = False) -> Iterator[None]:
    """Run the block. If it raises an error, restore the model and re-raise the error.

    The same objects are restored: submodules, classes, attributes and their order, hooks, parameters and buffers with
    ``requires_grad``, ``grad`` and ``training``, the content of lists, sets and dictionaries on modules, the fields of configs
    (``model.config``, ``peft_config``), and torch's random state. A tensor that was given other storage (``tensor.data = ...``)
    gets its own storage back. Values that were changed in place are restored only with ``copy_values``.

    The cost is linear in the number of modules and tensors; without ``copy_values`` no tensor is copied.

    Args:
        model: The model. Objects that its modules refer to by attributes are restored too.
        copy_values: Copy every parameter and buffer first. Needed if the block may change base weights in place; for a PEFT
            config, ``writes_base_weights`` returns whether it does.
    """
    before = _Snapshot(model, copy_values)
    try:
        yield
    except BaseException:
        before.restore()
        raise


def writes_base_weights(config: Any) -> bool:
    """Whether injecting this PEFT config changes weights of the base model, as OLoRA, PiSSA or LoftQ do."""
    init = getattr(config, "init_lora_weights", None)
    return isinstance(init, str) and init.lower() not in _INITS_THAT_ONLY_READ


class _Snapshot:
    """The state of every object that can be reached from a model."""

    def __init__(self, model: nn.Module, copy_values: bool):
        self._objects: list[tuple[Any, type, dict[str, Any]]] = []
        self._tensors: list[_TensorState] = []
        self._filled: list[tuple[Any, Any]] = []
        self._empty: list[Any] = []
        seen: set[int] = set()
        waiting: list[Any] = [model]
        while waiting:
            value = waiting.pop()
            if type(value) in _ATOMS or id(value) in seen:
                continue
            seen.add(id(value))
            waiting.extend(self._record(value, copy_values))
        gpus = {state.tensor.device for state in self._tensors if state.tensor.is_cuda}
        self._random = torch.get_rng_state()
        self._random_on_gpus = {gpu: torch.cuda.get_rng_state(gpu) for gpu in gpus}

    def _record(self, value: Any, copy_values: bool) -> Any:
        """Record the state of one object, and return the objects that it refers to."""
        if isinstance(value, Tensor):
            self._tensors.append(_TensorState(value, copy_values))
        elif isinstance(value, (dict, list, set)):
            if not value:
                self._empty.append(value)
                return ()
            # dict() also copies an OrderedDict, and faster than its own copy()
            content = dict(value) if isinstance(value, dict) else value.copy()
            self._filled.append((value, content))
            return content.values() if isinstance(content, dict) else content
        elif isinstance(value, tuple):
            return value
        elif _has_state(value):
            attributes = vars(value).copy()
            self._objects.append((value, type(value), attributes))
            return attributes.values()
        return ()

    def restore(self) -> None:
        """Restore every object. The order does not matter, because no object's state depends on another's."""
        for value, cls, attributes in self._objects:
            if type(value) is not cls:
                value.__class__ = cls
            vars(value).clear()
            vars(value).update(attributes)
        for container in self._empty:
            container.clear()
        for container, content in self._filled:
            if isinstance(container, list):
                container[:] = content
            else:
                container.clear()
                container.update(content)
        for tensor in self._tensors:
            tensor.restore()
        torch.set_rng_state(self._random)
        for gpu, state in self._random_on_gpus.items():
            torch.cuda.set_rng_state(state, gpu)


def _has_state(value: Any) -> bool:
    """Whether ``value`` is part of the model: a module, a config of PEFT or transformers, or an object of this library."""
    if isinstance(value, nn.Module):
        return True
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return False
    return (
        dataclasses.is_dataclass(value)
        or hasattr(value, "to_dict")
        or type(value).__module__.startswith("peftkit.")
    )


class _TensorState:
    """A tensor's storage, flags and attributes."""

    __slots__ = ("alias", "attributes", "cls", "grad", "leaf", "requires_grad", "tensor", "values")

    def __init__(self, tensor: Tensor, copy_values: bool):
        self.tensor, self.cls = tensor, type(tensor)
        # This alias keeps the storage alive: code that assigns tensor.data leaves the old values in it.
        self.alias = tensor.data
        self.values = self.alias.clone() if copy_values and not tensor.is_meta else None
        self.leaf, self.requires_grad = tensor.is_leaf, tensor.requires_grad
        self.grad = tensor.grad if self.leaf else None
        self.attributes = vars(tensor).copy()

    def restore(self) -> None:
        """Restore the class, storage, copied values, flags, gradient and attributes."""
        tensor = self.tensor
        if type(tensor) is not self.cls:
            tensor.__class__ = self.cls
        if not _share_memory(tensor, self.alias):
            tensor.data = self.alias
        if self.values is not None:
            self.alias.copy_(self.values)
        if self.leaf:
            if tensor.requires_grad != self.requires_grad:
                tensor.requires_grad_(self.requires_grad)
            if tensor.grad is not self.grad:
                tensor.grad = self.grad
        if vars(tensor) or self.attributes:
            vars(tensor).clear()
            vars(tensor).update(self.attributes)


def _share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same view of the same storage."""
    if (one.dtype, one.device, one.layout) != (other.dtype, other.device, other.layout):
        return False
    if one.shape != other.shape or one.layout is not torch.strided:
        return False
    return (
        one.stride() == other.stride()
        and one.storage_offset() == other.storage_offset()
        and one.untyped_storage()._cdata == other.untyped_storage()._cdata
    )
