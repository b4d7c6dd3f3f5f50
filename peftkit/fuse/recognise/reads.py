"""Finds what the code of a forward reads besides its arguments: classes, helpers, functions of torch, module-level names.

The bytecode is searched before the code runs, for each global name with the attributes that follow (``torch.nn.functional.silu``).
Code that uses anything else is refused, because it could change undetected or give another result in each call.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_DYNAMIC = frozenset("eval exec globals locals vars open __import__ delattr setattr".split())
"""Builtins with which code can read or change things without their names."""

_MODES = ("is_grad_enabled", "is_autocast_enabled", "is_compiling", "is_scripting")

_REFUSED_CODE = {
    "IMPORT_NAME": "imports a module while it runs",
    "STORE_GLOBAL": "sets a global name",
    "DELETE_GLOBAL": "deletes a global name",
    "STORE_DEREF": "sets a name of the function around it",
}

_CONSTANTS = (
    *(type(None), bool, int, float, str, type(Ellipsis)),
    *(torch.dtype, torch.Size, torch.device, torch.memory_format),
)
_BUILTINS = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
_LIBRARIES = ("torch", "math", "builtins", "typing", "functools", "operator")
"""Modules whose functions give the same result for the same arguments."""


class Refused(Exception):
    """Raised while a module is examined. The message is the reason why nothing was recognised."""


def is_plain(value: Any) -> bool:
    """Whether a setting is a constant that cannot change without being replaced."""
    if type(value) is tuple:
        return all(is_plain(v) for v in value)
    if type(value) is functools.partial:
        return is_plain(value.func) and all(map(is_plain, (*value.args, *value.keywords.values())))
    return type(value) in (*_CONSTANTS, types.FunctionType, *_BUILTINS)


class Reads:
    """The names that code reads, with their values.

    Attributes:
        spaces: By the identity of each namespace: the namespace, its name, and values by name.
        classes: By class, the names that were looked up on it.
    """

    def __init__(self) -> None:
        self.spaces: dict[int, tuple[Any, str, dict[str, Any]]] = {}
        self.classes: dict[type, set[str]] = {}
        self._scanned: set[Any] = set()

    def add_attribute(self, cls: type, name: str) -> None:
        """Record that ``name`` is looked up on ``cls`` (and is no attribute of an instance).

        Raises:
            Refused: It is code that is not allowed.
        """
        names = self.classes.setdefault(cls, set())
        if name in names:
            return
        names.add(name)
        # super() can call the other owners of the name.
        owners = [c for c in cls.__mro__ if c not in (nn.Module, object) and name in vars(c)]
        for i, owner in enumerate(owners):
            value = vars(owner)[name]
            if i:
                self._add(owner, vars(owner), owner.__name__, name)
            if isinstance(value, property):
                value = value.fget
            elif isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            self.add_value(f"{owner.__name__}.{name}", value, cls)

    def add_value(self, name: str, value: Any, cls: type | None = None) -> None:
        """Record the value of a name or a setting. If the value is a function, its code is searched too.

        Raises:
            Refused: It is code that is not allowed, or an object that may change.
        """
        if isinstance(value, functools.partial):
            value = value.func
        if isinstance(value, types.FunctionType):
            if cls is not None or not _is_library(value):
                self._add_function(value, cls)
            elif not _is_operation(value):
                raise Refused(f"its code calls {name}, whose result may change")
        elif isinstance(value, type):
            if not issubclass(value, nn.Module) and not _is_library(value):
                raise Refused(f"it uses the class {value.__name__}")
        elif isinstance(value, types.BuiltinFunctionType):
            if not _is_operation(value):
                raise Refused(f"its code calls {name}, whose result may change")
        elif not (is_plain(value) or type(value).__module__ == "typing"):
            raise Refused(
                f"its code reads {name}, a {type(value).__name__} whose contents may change"
            )

    def _add_function(self, function: types.FunctionType, cls: type | None) -> None:
        if (function, cls) in self._scanned:
            return
        self._scanned.add((function, cls))
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            self.add_value(name, cell.cell_contents, cls)
        for code in _codes(function.__code__):
            for name, *attributes in _chains(code):
                self._add_chain(function, name, attributes)
                if name == "super" and cls is not None:
                    for attribute in code.co_names:
                        if any(attribute in vars(c) for c in cls.__mro__[1:]):
                            self.add_attribute(cls, attribute)

    def _add_chain(self, function: Any, name: str, attributes: list[str]) -> None:
        """``name.attribute.attribute ...`` in the code of a function."""
        space = function.__globals__
        if name not in space:
            if name in _DYNAMIC:
                raise Refused(f"{function.__qualname__} uses {name}")
            return
        self._add(space, space, function.__module__, name)
        value, path = space[name], name
        for attribute in attributes:
            if isinstance(value, types.ModuleType):
                space = vars(value)
                if not _is_library(value) or attribute not in space:
                    break
                self._add(space, space, value.__name__, attribute)
                value, path = space[attribute], f"{path}.{attribute}"
            else:
                if isinstance(value, type) and issubclass(value, nn.Module):
                    self.add_attribute(value, attribute)
                break
        if isinstance(value, types.ModuleType):
            raise Refused(f"{function.__qualname__} uses the module {value.__name__}")
        self.add_value(path, value)

    def _add(self, owner: Any, space: Any, label: str, name: str) -> None:
        self.spaces.setdefault(id(owner), (space, label, {}))[2][name] = space[name]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _chains(code: types.CodeType) -> Iterator[list[str]]:
    """Each global name in the code with the attributes that are read from it."""
    chain: list[str] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname == "EXTENDED_ARG":
            continue
        if chain and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain.append(instruction.argval)
            continue
        if chain:
            yield chain
        chain = []
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            chain = [instruction.argval]
        elif instruction.opname in _REFUSED_CODE:
            raise Refused(f"{code.co_name} {_REFUSED_CODE[instruction.opname]}")
    if chain:
        yield chain


def _is_operation(function: Any) -> bool:
    """Whether a library function depends only on its arguments, or on a mode in which the forward is traced too.

    Other functions depend on the process or the machine: ``torch.cuda.is_available``, ``torch.get_default_dtype``.
    """
    if function.__name__ in _MODES:
        return True
    if isinstance(function, types.BuiltinFunctionType):
        return function.__self__ is not torch._C
    return function.__module__ in ("torch.nn.functional", "torch.functional")


def _is_library(value: Any) -> bool:
    name = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
    return (name or "").partition(".")[0] in _LIBRARIES
