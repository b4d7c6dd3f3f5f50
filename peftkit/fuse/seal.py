"""What a verdict about a module relied on, compared in each forward at a cost below a microsecond.

A ``Seal`` holds for all modules of one kind: it keeps no module and no tensor, so a copy of a module is as good as the module. It
compares tuples that C code takes out of dictionaries; no submodule is searched and no code is read again.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch.nn.modules.module as torch_module
from torch import nn

from peftkit.fuse.plan import Reason

_HOOKS = operator.itemgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)
_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without the forwards that were swapped in."""
    cls: Any = type(module)
    while "_peftkit_swap" in vars(cls):
        cls = cls._peftkit_swap[1]
    return cls


class Seal:
    """What a kind of module was recognised as, with the names and settings that this relied on and their values.

    Attributes:
        answer: The formula, or the ``Reason`` why the module computes none that is known.

    Args:
        answer: As above.
        find: Recognises a module of this kind again and returns its seal; a function that can be pickled.
        spaces: Namespaces as ``(namespace, its name, value of each name)``.
        classes: Attributes that were looked up on classes.
        parts: The module itself and each submodule it calls: path, class, settings it reads.
    """

    __slots__ = ("_items", "_names", "_parts", "_spaces", "answer", "find")

    def __init__(
        self,
        answer: Any,
        find: Callable[[nn.Module], Seal],
        spaces: Iterable[tuple[Any, str, dict[str, Any]]] = (),
        classes: Mapping[type, Iterable[str]] = MappingProxyType({}),
        parts: Iterable[tuple[tuple[str, ...], type, dict[str, Any]]] = (),
    ):
        self.answer, self.find = answer, find
        self._spaces = [(space, label, dict(values)) for space, label, values in spaces]
        items = [(space, n, v) for space, _, values in self._spaces for n, v in values.items()]
        self._items = tuple(zip(*items, strict=True)) or ((), (), ())
        names = [(cls, name, getattr(cls, name)) for cls, all in classes.items() for name in all]
        self._names = tuple(zip(*names, strict=True)) or ((), (), ())
        self._parts = [
            _Part(path, cls, settings, frozenset(classes.get(cls, ())))
            for path, cls, settings in parts
        ]

    def broken(self, module: nn.Module) -> Reason | None:
        """What has changed since ``module``, or another of its kind, was recognised; ``None`` if nothing has."""
        try:
            spaces, keys, values = self._items
            if tuple(map(operator.getitem, spaces, keys)) != values:
                return self._changed_name()
            classes, names, values = self._names
            if tuple(map(getattr, classes, names)) != values:
                return self._changed_name()
            if len(self._parts) > 1 and any(_GLOBAL_HOOKS):
                return Reason("hooks on all modules are registered")
            for part in self._parts:
                if part.changed(module):
                    return part.reason(module)
        except Exception:  # a name was removed, or a value compares in its own way
            return self._changed_name() or self._part_reason(module)
        return None

    def __deepcopy__(self, memo: Any) -> Seal:
        return self

    def __copy__(self) -> Seal:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return LoadedSeal, (self.answer, self.find)

    def _changed_name(self) -> Reason | None:
        for space, label, values in self._spaces:
            for name, value in values.items():
                if not _same(space, name, value):
                    return Reason(f"{label}.{name} was replaced")
        for cls, name, value in zip(*self._names, strict=True):
            if getattr(cls, name, None) != value:
                return Reason(f"{cls.__name__}.{name} was replaced")
        return None

    def _part_reason(self, module: nn.Module) -> Reason:
        return next(reason for part in self._parts if (reason := part.reason(module)))


class LoadedSeal(Seal):
    """A seal that was pickled: it recognises the module again when it is first used."""

    __slots__ = ("_found",)

    def broken(self, module: nn.Module) -> Reason | None:
        """As ``Seal.broken``; also broken if the module is recognised as something else than before it was saved."""
        if not hasattr(self, "_found"):
            found = self.find(module)
            if found.answer != self.answer:
                is_reason = isinstance(found.answer, Reason)
                return (
                    found.answer if is_reason else Reason("its formula changed since it was saved")
                )
            self._found = found
        return self._found.broken(module)


class _Part:
    """The module itself or one submodule, found by its path."""

    __slots__ = ("_get", "_partials", "_shadows", "_values", "cls", "path", "settings")

    def __init__(
        self, path: tuple[str, ...], cls: type, settings: dict[str, Any], names: frozenset[str]
    ):
        self.path, self.cls = path, cls
        self.settings = settings
        plain = {n: v for n, v in settings.items() if type(v) is not functools.partial}
        self._get: Any = _items(plain) if plain else None
        self._values = self._get(plain) if plain else None
        # a copy of a module has a copy of a partial, which is never equal to another
        self._partials = [
            (operator.itemgetter(n), v.func, v.args, v.keywords)
            for n, v in settings.items()
            if type(v) is functools.partial
        ]
        self._shadows = names

    def changed(self, module: Any) -> bool:
        """Whether this part is of another class, has other settings, or would run anything else when it is called."""
        for name in self.path:
            module = module._modules[name]
        state = module.__dict__
        if self.path and (type(module) is not self.cls or any(_HOOKS(state))):
            return True
        if self._get is not None and self._get(state) != self._values:
            return True
        for get, func, args, keywords in self._partials:
            held = get(state)
            if held.func is not func or held.args != args or held.keywords != keywords:
                return True
        return not state.keys().isdisjoint(self._shadows)

    def reason(self, module: Any) -> Reason | None:
        """What is another now, in words."""
        where = ".".join(self.path)
        for name in self.path:
            module = getattr(module, "_modules", {}).get(name)
        if not isinstance(module, nn.Module) or own_class(module) is not self.cls:
            found = type(module).__name__
            return Reason(f"its {where or 'class'} was a {self.cls.__name__} and is now a {found}")
        of = f"its {where}" if where else "it"
        state = module.__dict__
        if self.path and any(_HOOKS(state)):
            return Reason(f"{of} has hooks")
        for name in self._shadows:
            if name in state:
                return Reason(f"{of} has a {name} of its own")
        for name, value in self.settings.items():
            if not _same(state, name, value):
                owner = f"its {where}." if where else "its "
                now = state.get(name, "removed")
                return Reason(f"{owner}{name} was {value!r} when it was fused and is now {now!r}")
        return Reason(f"{of} was changed after it was fused")


def _items(values: dict[str, Any]) -> Callable[[Any], Any]:
    return operator.itemgetter(*values)


def _same(space: Any, name: str, value: Any) -> bool:
    held = space.get(name, space)
    if type(value) is functools.partial and type(held) is functools.partial:
        return (held.func, held.args, held.keywords) == (value.func, value.args, value.keywords)
    return held is value or (type(held) is type(value) and bool(held == value))
