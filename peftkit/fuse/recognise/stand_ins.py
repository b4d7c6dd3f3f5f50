"""Stand-ins for modules in a trace. A stand-in has the module's class and attributes, and records each attribute that is read.

Parameters of a stand-in are zeros. Linears are opaque: they can be called, but have no attributes. A stand-in cannot be changed. A call
of a stand-in runs the forward of its class without hooks.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from peftkit.fuse.recognise.reads import is_plain
from peftkit.fuse.seal import changed_calls
from peftkit.swap import own_class

if TYPE_CHECKING:
    from peftkit.fuse.recognise.trace import Leaf, Path, Tracer


class _Linear:
    """A linear that can be called and has no attributes."""

    def __init__(self, tracer: Tracer, leaf: Leaf):
        self.__call = functools.partial(tracer.leaf, leaf)

    def __call__(self, x: Any) -> Tensor:
        return self.__call(x)


class _Recording:
    """Mixed into a class: reads of attributes are recorded, and attributes cannot be set."""

    def __getattribute__(self, name: str) -> Any:
        return _read(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        tracer = object.__getattribute__(self, "__dict__")["_peftkit_tracer"]
        raise tracer.refuse(f"its forward sets its own {name}")

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


@functools.lru_cache(maxsize=256)
def _recording_class(cls: type) -> type:
    return type(cls.__name__, (_Recording, cls), {})


def stand_in_for(module: nn.Module, path: Path, tracer: Tracer) -> Any:
    """A stand-in for ``module`` whose reads are recorded.

    Raises:
        Refused: Calling ``module`` would run more than the forward of its class.
    """
    where = ".".join(path) or "it"
    cls = own_class(module)
    state = module.__dict__
    if cls.__call__ is not nn.Module.__call__:
        raise tracer.refuse(f"{where} has a __call__ of its own")
    if path and (reason := changed_calls(module)):
        raise tracer.refuse(f"its {where} {reason}")
    tracer.kind.classes[path] = cls
    tracer.kind.settings.setdefault(path, {})
    with tracer.refusing():
        tracer.kind.reads.add_attribute(cls, "forward")
    stand_in: Any = object.__new__(_recording_class(cls))
    own = object.__getattribute__(stand_in, "__dict__")
    own.update(state)
    own["_parameters"] = {
        n: tracer.parameter(".".join((*path, n)), p) for n, p in state["_parameters"].items()
    }
    own["_modules"] = dict(state["_modules"])
    own.update(_peftkit_path=path, _peftkit_class=cls, _peftkit_tracer=tracer)
    return stand_in


def _read(stand_in: Any, name: str) -> Any:
    """Read and record an attribute of a stand-in."""
    state: dict[str, Any] = object.__getattribute__(stand_in, "__dict__")
    path, cls, tracer = state["_peftkit_path"], state["_peftkit_class"], state["_peftkit_tracer"]
    if name == "training":
        return tracer.training
    if name == "__class__":
        return cls
    if name.startswith("__"):
        raise tracer.refuse(f"its forward reads {name}")
    if name in state["_parameters"]:
        return state["_parameters"][name]
    if name in state["_modules"]:
        return _child(state["_modules"], name, path, tracer)
    if name in state["_buffers"]:
        raise tracer.refuse(f"its forward reads the buffer {name}")
    if name in state and not isinstance(getattr(cls, name, None), property):
        value = state[name]
        if not is_plain(value):
            kind = type(value).__name__
            raise tracer.refuse(f"its forward reads {name}, a {kind} whose contents may change")
        tracer.kind.settings[path][name] = value
        with tracer.refusing():
            tracer.kind.reads.add_value(name, value)
        return value
    if not hasattr(cls, name):
        raise tracer.refuse(f"its forward reads {name}, which it does not have")
    with tracer.refusing():
        tracer.kind.reads.add_attribute(cls, name)
    return object.__getattribute__(stand_in, name)


def _child(children: dict[str, Any], name: str, path: Path, tracer: Tracer) -> Any:
    """A stand-in for a submodule, made when it is first read."""
    child = children[name]
    if not path and name in tracer.leaves and not isinstance(child, _Linear):
        child = children[name] = _Linear(tracer, tracer.leaves[name])
    elif isinstance(child, nn.Module) and not isinstance(child, _Recording):
        child = children[name] = stand_in_for(child, (*path, name), tracer)
    return child
