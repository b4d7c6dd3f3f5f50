"""Seals: the recognised formula of a module, with everything that the recognition relied on.

Each forward checks in less than a microsecond that nothing of this has changed. A ``Seal`` is valid for all modules of one kind. It
keeps no module and no tensor, so it is valid for copies of a module too. The check is one generated function for each kind (as
``namedtuple`` and ``dataclass`` generate theirs): a chain of ``is`` and ``==`` that takes 30 nanoseconds per name. A loop over the
names would take three times as long.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch.nn.modules.module as torch_module
from torch import nn

from peftkit.fuse.plan import Reason
from peftkit.swap import own_class

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(
    getattr(torch_module, f"_global{name}")
    for name in (*_HOOKS[:2], "_backward_hooks", "_backward_pre_hooks")
)


class Part(NamedTuple):
    """The module itself, or a submodule that its forward calls.

    Attributes:
        path: Names of children from the module to the part.
        cls: The class of the part.
        settings: Attributes of the part that a forward reads, with their values.
        names: Names that a forward looks up on the class. An instance attribute of such a name would hide the class's.
    """

    path: tuple[str, ...]
    cls: type
    settings: dict[str, Any]
    names: tuple[str, ...] = ()


def changed_calls(module: nn.Module) -> str | None:
    """What a call of ``module`` would run besides the forward of its class, in words such as "has hooks"; or ``None``."""
    state = module.__dict__
    if "forward" in state:
        return "has a forward of its own"
    return "has hooks" if any(state[name] for name in _HOOKS) else None


class Seal:
    """The formula of a kind of module, with the names and settings that its recognition relied on, and their values.

    Attributes:
        answer: The formula, or the ``Reason`` why the module computes no known formula.
        find: A function that recognises a module of this kind again and returns its seal. It can be pickled.

    Args:
        answer: As above.
        find: As above.
        spaces: Namespaces as ``(namespace, its name, values by name)``.
        classes: By class, the names that were looked up on it.
        parts: The module itself and each submodule it calls.
    """

    __slots__ = ("_classes", "_holds", "_parts", "_spaces", "answer", "find")

    def __init__(
        self,
        answer: Any,
        find: Callable[[nn.Module], Seal],
        spaces: Iterable[tuple[Any, str, dict[str, Any]]] = (),
        classes: Mapping[type, Iterable[str]] = MappingProxyType({}),
        parts: Iterable[Part] = (),
    ):
        self.answer, self.find = answer, find
        self._spaces = [(space, label, dict(values)) for space, label, values in spaces]
        self._classes = [(cls, n, getattr(cls, n)) for cls, names in classes.items() for n in names]
        self._parts = [part._replace(names=tuple(classes.get(part.cls, ()))) for part in parts]
        self._holds = _comparison(self._spaces, self._classes, self._parts)

    def broken(self, module: nn.Module) -> Reason | None:
        """What has changed since ``module``, or another module of its kind, was recognised; ``None`` if nothing has."""
        try:
            if self._holds(module):
                return None
        except Exception:  # a name is missing, or a value compares in its own way
            return self._reason(module)
        return self._reason(module)

    def __deepcopy__(self, memo: Any) -> Seal:
        return self

    def __copy__(self) -> Seal:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return LoadedSeal, (self.answer, self.find)

    def _reason(self, module: nn.Module) -> Reason:
        try:
            reason = self._changed_name() or self._changed_part(module)
        except Exception:
            reason = None
        return reason or Reason("it cannot be compared with the module that was recognised")

    def _changed_name(self) -> Reason | None:
        for space, label, values in self._spaces:
            for name, value in values.items():
                if not _same(space, name, value):
                    return Reason(f"{label}.{name} was replaced")
        for cls, name, value in self._classes:
            if getattr(cls, name, None) != value:
                return Reason(f"{cls.__name__}.{name} was replaced")
        return None

    def _changed_part(self, module: nn.Module) -> Reason | None:
        if len(self._parts) > 1 and any(_GLOBAL_HOOKS):
            return Reason("hooks on all modules are registered")
        reasons = (_part_reason(part, module) for part in self._parts)
        return next((reason for reason in reasons if reason is not None), None)


class LoadedSeal(Seal):
    """A seal that was unpickled. It recognises the module again at its first use."""

    __slots__ = ("_found",)

    def broken(self, module: nn.Module) -> Reason | None:
        """As ``Seal.broken``. Also gives a reason if the module is not recognised as the formula that it had before saving."""
        if not hasattr(self, "_found"):
            found = self.find(module)
            if found.answer != self.answer:
                is_reason = isinstance(found.answer, Reason)
                return (
                    found.answer if is_reason else Reason("its formula changed since it was saved")
                )
            self._found = found
        return self._found.broken(module)


def _comparison(spaces: Any, classes: Any, parts: list[Part]) -> Callable[[nn.Module], bool]:
    """A generated function that returns whether nothing has changed. It may raise an exception if something has changed."""
    held: dict[str, Any] = {}

    def hold(value: Any) -> str:
        held[f"v{len(held)}"] = value
        return f"v{len(held) - 1}"

    def settings(part: Part) -> list[str]:
        # Copies and other modules of the kind have equal values, but not always the same objects.
        tests = []
        for n, v in part.settings.items():
            equal = f"s == {hold(v)}"
            if type(v) is functools.partial:  # partials compare by identity
                equal = f"s.func is {hold(v.func)} and s.args == {hold(v.args)}"
                equal += f" and s.keywords == {hold(v.keywords)}"
            same = f"(s := state[{n!r}]) is {hold(v)} or type(s) is {hold(type(v))} and {equal}"
            tests.append(f"({same})")
        # The forward of the module itself is not checked, because this forward runs the check.
        hidden = [n for n in part.names if part.path or n != "forward"]
        return tests + [f"{n!r} not in state" for n in hidden]

    tests = [f"{hold(space)}[{n!r}] is {hold(v)}" for space, _, vs in spaces for n, v in vs.items()]
    for cls, n, value in classes:
        # If the class itself has the name, its dictionary is read. If not, getattr also finds a name that was set later on a class
        # between it and the owner of the name.
        own = n in vars(cls)
        value = vars(cls)[n] if own else value
        read = f"{hold(vars(cls))}[{n!r}]" if own else f"getattr({hold(cls)}, {n!r})"
        tests.append(f"{read} {'is' if own else '=='} {hold(value)}")
    if len(parts) > 1:
        tests += [f"not {hold(hooks)}" for hooks in _GLOBAL_HOOKS]
    code = ["def holds(module):"]
    for part in parts:
        if part.path:
            children = "".join(f"._modules[{n!r}]" for n in part.path)
            code += [f" part = module{children}", " state = part.__dict__"]
            hooks = [f"not state[{n!r}]" for n in _HOOKS]
            lines = [f"type(part) is {hold(part.cls)}", *hooks, *settings(part)]
        else:
            code.append(" state = module.__dict__")
            lines = settings(part)
        code += [f" if not ({' and '.join(lines)}): return False"] if lines else []
    code.append(f" return {' and '.join(tests) or True}")
    exec("\n".join(code), held)
    return held["holds"]


def _part_reason(part: Part, module: Any) -> Reason | None:
    """What has changed in one part, in words, or ``None``."""
    where = ".".join(part.path)
    for name in part.path:
        module = getattr(module, "_modules", {}).get(name)
    if not isinstance(module, nn.Module) or own_class(module) is not part.cls:
        found = "missing" if module is None else f"a {type(module).__name__}"
        return Reason(f"its {where or 'class'} was a {part.cls.__name__} and is now {found}")
    if part.path and (change := changed_calls(module)):
        return Reason(f"its {where} {change}")
    state = module.__dict__
    for name in part.names:
        if name in state and (part.path or name != "forward"):
            return Reason(f"{f'its {where}' if where else 'it'} has a {name} of its own")
    for name, value in part.settings.items():
        if not _same(state, name, value):
            now = repr(state[name]) if name in state else "missing"
            setting = f"{where}.{name}" if where else name
            return Reason(f"its {setting} was {value!r} when it was fused and is now {now}")
    return None


def _same(space: Any, name: str, value: Any) -> bool:
    held = space.get(name, space)
    if type(value) is functools.partial and type(held) is functools.partial:
        return (held.func, held.args, held.keywords) == (value.func, value.args, value.keywords)
    return held is value or (type(held) is type(value) and bool(held == value))
