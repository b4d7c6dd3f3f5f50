"""A module's class exchanged for a subclass with a fused forward, and back."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


@functools.cache
def fused_class(mixin: type, base: type[nn.Module]) -> type[nn.Module]:
    """``base`` with the forward of ``mixin``; keeps the name and module of ``base``, which others match and print."""
    members = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "_peftkit_swap": (mixin, base),
    }
    return type(base.__name__, (mixin, base), members)


def swap_in(module: nn.Module, mixin: type) -> None:
    """Give ``module`` the forward of ``mixin``, which falls back to the module's own by ``super()``."""
    module.__class__ = fused_class(mixin, type(module))


def swap_out(module: nn.Module) -> None:
    """Undo ``swap_in`` and remove what the fused forward kept on the module."""
    cls: Any = type(module)
    module.__class__ = cls._peftkit_swap[1]
    for key in [key for key in module.__dict__ if key.startswith("_peftkit_")]:
        del module.__dict__[key]


def _rebuild(mixin: type, base: type[nn.Module]) -> nn.Module:
    cls = fused_class(mixin, base)
    return cls.__new__(cls)


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    # a class made at run time cannot be found by its name; name the two it is made of instead
    cls: Any = type(self)
    return _rebuild, cls._peftkit_swap, self.__dict__
