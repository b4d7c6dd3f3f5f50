"""Exchange a module's class for a subclass with a fused forward, and back. peftkit changes classes only with this file."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


@functools.cache
def fused_class(mixin: type, base: type[nn.Module]) -> type[nn.Module]:
    """Make a subclass of ``base`` with the forward of ``mixin``.

    The subclass has the name and ``__module__`` of ``base``, because other code matches and prints them.
    """
    members = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "_peftkit_swap": (mixin, base),
    }
    return type(base.__name__, (mixin, base), members)


def swap_in(module: nn.Module, mixin: type) -> None:
    """Give ``module`` the forward of ``mixin``, which can call the module's own forward by ``super()``."""
    module.__class__ = fused_class(mixin, type(module))


def swap_out(module: nn.Module, mixin: type) -> None:
    """Undo ``swap_in`` of this mixin. Other mixins stay; if none is left, peftkit's attributes on the module are removed."""
    mixins, base = _parts(type(module))
    kept = [other for other in mixins if other is not mixin]
    module.__class__ = _class_of(tuple(kept), base)
    if not kept:
        for key in [key for key in module.__dict__ if key.startswith("_peftkit_")]:
            del module.__dict__[key]


def swapped_in(module: nn.Module) -> tuple[type, ...]:
    """Return the mixins of a module, the last one swapped in first."""
    return _parts(type(module))[0]


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module without its mixins."""
    return _parts(type(module))[1]


def _parts(cls: Any) -> tuple[tuple[type, ...], type[nn.Module]]:
    """Return the mixins of a class that ``fused_class`` made, the last one swapped in first, and the module's own class."""
    mixins = []
    while "_peftkit_swap" in cls.__dict__:
        mixin, cls = cls._peftkit_swap
        mixins.append(mixin)
    return tuple(mixins), cls


def _class_of(mixins: tuple[type, ...], base: type[nn.Module]) -> type[nn.Module]:
    for mixin in reversed(mixins):
        base = fused_class(mixin, base)
    return base


def _rebuild(mixins: tuple[type, ...], base: type[nn.Module]) -> nn.Module:
    cls = _class_of(mixins, base)
    return cls.__new__(cls)


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    # pickle cannot find a class that was made at run time by its name, so the classes that it was made of are saved instead
    state = {key: value for key, value in self.__dict__.items() if key not in CACHES}
    return _rebuild, _parts(type(self)), state


CACHES = ("_peftkit_found",)
"""Attributes that are computed again if they are missing, so copies and pickles leave them out."""
