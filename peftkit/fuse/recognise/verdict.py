"""Seals, kept by kind of module: the traces are run once for each class with the settings that its forward reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from peftkit.fuse.plan import Reason
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
    """The seal with the ``answer`` of a kind of module, from an earlier module whose seal fits this one if there is one.

    Args:
        key: What the answer depends on besides that which the traces write down.
        module: The module.
        answer: Traces the module, fills the kind, and returns what it is or a ``Reason``; whatever it raises is a reason too.
        find: Examines a module of this kind again; a function that can be pickled.
        skip: Children of which nothing is read.
    """
    key = key, _structure(module, skip)
    known = _seals.get(key, [])
    for seal in known:
        if seal.broken(module) is None:
            return seal
    kind = Kind()
    try:
        found = _arguments_reason(module) or answer(kind)
    except Refused as refused:
        found = Reason(str(refused))
    except Exception as error:  # whatever the forward of an unknown module raises
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
    """What a reason may depend on that no seal compares: names and types of attributes, hooks of children."""
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
    """Why a forward cannot be called on an input alone."""
    signature = inspect.signature(own_class(module).forward)
    try:
        signature.bind(module, None)
    except TypeError:
        names = ", ".join(list(signature.parameters)[1:])
        return Reason(f"its forward takes other arguments than one input ({names})")
    return None
