"""What a verdict about a module relied on, compared in each forward at a cost below a microsecond.

A ``Seal`` holds for all modules of one kind: it keeps no module and no tensor, so a copy of a module is as good as the module. The
comparison is one function that is written for the kind, as ``namedtuple`` and ``dataclass`` write theirs: a chain of ``is`` and
``==`` that takes 30 nanoseconds a name, where a loop over the names would take three times that.
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
        cls: Its class.
        settings: Attributes that a forward reads, with their values.
        names: What a forward looks up on the class, which an attribute of the part would hide.
    """

    path: tuple[str, ...]
    cls: type
    settings: dict[str, Any]
    names: tuple[str, ...] = ()


def changed_calls(module: nn.Module) -> str | None:
    """What calling a submodule would run besides the forward of its class, as a predicate."""
    state = module.__dict__
    if "forward" in state:
        return "has a forward of its own"
    return "has hooks" if any(state[name] for name in _HOOKS) else None


class Seal:
    """What a kind of module was recognised as, with the names and settings that this relied on and their values.

    Attributes:
        answer: The formula, or the ``Reason`` why the module computes none that is known.
        find: Recognises a module of this kind again and returns its seal; a function that can be pickled.

    Args:
        answer: As above.
        find: As above.
        spaces: Namespaces as ``(namespace, its name, value of each name)``.
        classes: Names that were looked up on classes.
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
        """What has changed since ``module``, or another of its kind, was recognised; ``None`` if nothing has."""
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


def _comparison(spaces: Any, classes: Any, parts: list[Part]) -> Callable[[nn.Module], bool]:
    """A function that tells whether everything is as it was; it may raise if it is not."""
    held: dict[str, Any] = {}

    def hold(value: Any) -> str:
        held[f"v{len(held)}"] = value
        return f"v{len(held) - 1}"

    def settings(part: Part) -> list[str]:
        # Other modules of the kind, and copies, have equal values, which need not be the same objects.
        tests = []
        for n, v in part.settings.items():
            equal = f"s == {hold(v)}"
            if type(v) is functools.partial:  # is equal to no other
                equal = f"s.func is {hold(v.func)} and s.args == {hold(v.args)}"
                equal += f" and s.keywords == {hold(v.keywords)}"
            same = f"(s := state[{n!r}]) is {hold(v)} or type(s) is {hold(type(v))} and {equal}"
            tests.append(f"({same})")
        # The forward of the module itself is what uses the seal.
        hidden = [n for n in part.names if part.path or n != "forward"]
        return tests + [f"{n!r} not in state" for n in hidden]

    tests = [f"{hold(space)}[{n!r}] is {hold(v)}" for space, _, vs in spaces for n, v in vs.items()]
    for cls, n, value in classes:
        # The dictionary of a class shows what is set on it, not what is set on a class between it and the owner of a name.
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
    """What is another in one part now, in words."""
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
