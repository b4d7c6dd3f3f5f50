"""Seals, cached by kind of module. Traces run once for each class with the settings that its forward reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from peftkit.fuse.plan import Reason
from peftkit.fuse.recognise.modes import without_modes
from peftkit.fuse.recognise.reads import Refused, is_plain
from peftkit.fuse.recognise.trace import Kind
from peftkit.fuse.seal import Part, Seal, changed_calls
from peftkit.swap import own_class

_MOST = 1024

_seals: dict[Any, list[Seal]] = {}


def examine(
    key: Any,
    module: nn.Module,
    answer: Callable[[Kind], Any],
    find: Callable[[nn.Module], Seal],
    skip: Collection[str] = (),
) -> Seal:
    """The seal of ``module``: that of an earlier module of the same kind, or a new one with the ``answer`` of this module.

    Args:
        key: Everything that the answer depends on and that the traces do not record.
        module: The module.
        answer: Traces the module, fills the kind, and returns the formula or a ``Reason``. Any exception is a reason too.
        find: A function that examines a module of this kind again. It can be pickled.
        skip: Names of children whose attributes are not read.
    """
    key = key, _structure(module, skip)
    known = _seals.get(key, [])
    for seal in known:
        if seal.broken(module) is None:
            return seal
    kind = Kind()
    try:
        with without_modes():
            found = _arguments_reason(module) or answer(kind)
    except Refused as refused:
        found = Reason(str(refused))
    except Exception as error:  # the forward of an unknown module can raise anything
        text = " ".join(str(error).split())[:120]
        found = Reason(
            f"its forward fails on a trial input whose last axis holds the features ({type(error).__name__}: {text})"
        )
    parts = [Part(path, cls, kind.settings[path]) for path, cls in kind.classes.items()]
    seal = Seal(found, find, kind.reads.spaces.values(), kind.reads.classes, parts)
    if len(_seals) >= _MOST:
        _seals.clear()
    _seals[key] = [*known[-7:], seal]
    return seal


def _structure(module: nn.Module, skip: Collection[str] = ()) -> tuple[Any, ...]:
    """Everything that a reason may depend on and that no seal compares: names and types of attributes, hooks of children."""
    state = module.__dict__
    children = ((n, child) for n, child in module._modules.items() if n not in skip and child)
    return (
        own_class(module),
        tuple(
            (name, type(value), is_plain(value))
            for name, value in state.items()
            if not name.startswith("_peftkit_")
        ),
        *(tuple(state[kind]) for kind in ("_parameters", "_buffers", "_modules")),
        tuple((n, changed_calls(child), _structure(child)) for n, child in children),
    )


def _arguments_reason(module: nn.Module) -> Reason | None:
    """Why a forward cannot be called with one input only, or ``None``."""
    signature = inspect.signature(own_class(module).forward)
    try:
        signature.bind(module, None)
    except TypeError:
        names = ", ".join(list(signature.parameters)[1:])
        return Reason(f"its forward takes other arguments than one input ({names})")
    return None
