"""The modes of a trace: aten operations become nodes of the graph, and calls of torch functions are logged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from peftkit.fuse.recognise.graph import Node, Traced

if TYPE_CHECKING:
    from peftkit.fuse.recognise.trace import Tracer


class Dispatched(TorchDispatchMode):
    """Turns each aten operation into nodes."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch would import its compiler to switch it off

    def __init__(self, tracer: Tracer):
        super().__init__()
        self._tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tracer, kwargs = self._tracer, kwargs or {}
        out = func(*args, **kwargs)
        if tracer.paused or tracer.graph is None:
            return out
        if func._schema.is_mutable:
            raise tracer.refuse("its forward changes a tensor in place")
        traced = _map(lambda t: Traced(tracer.node_of(t), t), (args, kwargs))
        nodes = tracer.graph.add_call(func, *traced, out)
        pairs = [(out, nodes)] if isinstance(out, Tensor) else zip(out, nodes, strict=True)
        for tensor, node in pairs:
            if isinstance(tensor, Tensor):
                tracer.keep(tensor, node)
        return out


class Called(TorchFunctionMode):
    """Logs each call of a torch function, and refuses functions through which a forward could depend on values or sizes of its input."""

    def __init__(self, tracer: Tracer):
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tracer, kwargs = self._tracer, kwargs or {}
        if tracer.paused:
            return func(*args, **kwargs)
        tracer.check_modes()
        name = getattr(func, "__name__", type(func).__name__)
        if name == "__get__":
            return self._property(func.__self__.__name__, args[0])
        if name == "size" and not kwargs:
            sizes = _Sizes(args[0].shape, tracer)
            return sizes if len(args) == 1 else sizes[args[1]]
        if name == "is_floating_point":
            return func(*args, **kwargs)
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        seen: list[Tensor] = []
        entry = _map(lambda t: seen.append(t) or ("tensor", tracer.place(t)), (args, kwargs))
        if not seen:
            raise tracer.refuse(f"its forward calls {name} without a tensor")
        composite = _COMPOSITES.get(func)
        if composite is None:
            out = func(*args, **kwargs)
        else:
            tracer.kind.composites.add(name)
            with tracer.pause():
                out = func(*args, **kwargs)
            if tracer.graph is not None:
                tracer.keep(out, composite(tracer, out, *args, **kwargs))
        outs = out if isinstance(out, (tuple, list)) else (out,)
        if not all(isinstance(o, Tensor) for o in outs):
            raise tracer.refuse(f"its forward depends on the values or sizes of a tensor ({name})")
        tracer.log.append((func, entry, [tracer.place(o) for o in outs]))
        return out

    def _dropout(self, x: Tensor, p: float = 0.5, *_: Any, **__: Any) -> Tensor:
        if p:
            raise self._tracer.refuse(f"it has dropout of its own (p={p})")
        return x

    def _property(self, name: str, tensor: Tensor) -> Any:
        if name == "dtype":
            return tensor.dtype
        if isinstance(tensor, nn.Parameter) and name in ("shape", "data"):
            return tensor if name == "data" else tensor.shape
        if name == "shape":
            return _Sizes(tensor.shape, self._tracer)
        raise self._tracer.refuse(f"its forward reads the {name} of a tensor")


class _Sizes(tuple):
    """The shape of a tensor. The forward of a norm or an MLP may read only the last size."""

    _tracer: Tracer

    def __new__(cls, sizes: Any, tracer: Tracer) -> _Sizes:
        self = super().__new__(cls, sizes)
        self._tracer = tracer
        return self

    def __getitem__(self, index: Any) -> Any:
        if index == -1 or index == slice(-1, None):
            return super().__getitem__(index)
        raise self._tracer.refuse("its forward depends on the leading sizes of its input")

    def _refuse(self, *_: Any) -> Any:
        raise self._tracer.refuse("its forward depends on the leading sizes of its input")

    __iter__ = __len__ = __contains__ = __add__ = __mul__ = __bool__ = _refuse  # type: ignore
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = numel = count = index = _refuse  # type: ignore
    __hash__ = None  # type: ignore


def _layer_norm(
    tracer: Tracer, out: Tensor, x: Tensor, shape: Any, weight=None, bias=None, eps=1e-5, *_: Any
) -> Node:
    """The nodes of the function. Torch computes it in float32 or wider and rounds once."""
    graph: Any = tracer.graph
    wide, widen = _wide(tracer, x, shape)
    centred = graph.sub(wide, graph.mean(wide))
    y = graph.mul(centred, graph.rsqrt(graph.add(graph.variance(wide), eps)))
    y = y if weight is None else graph.mul(y, widen(weight))
    y = y if bias is None else graph.add(y, widen(bias))
    return y if wide is tracer.node_of(x) else graph.cast(y, x.dtype)


def _rms_norm(
    tracer: Tracer, out: Tensor, x: Tensor, shape: Any, weight=None, eps: float | None = None
) -> Node:
    """The nodes of the function. Torch computes it in float32 or wider and rounds once."""
    if eps is None:
        raise tracer.refuse("its eps depends on the dtype (None)")
    graph: Any = tracer.graph
    wide, widen = _wide(tracer, x, shape)
    y = graph.mul(wide, graph.rsqrt(graph.add(graph.mean(graph.square(wide)), eps)))
    y = y if weight is None else graph.mul(y, widen(weight))
    return y if wide is tracer.node_of(x) else graph.cast(y, x.dtype)


def _wide(tracer: Tracer, x: Tensor, shape: Any) -> tuple[Node, Callable[[Tensor], Node]]:
    if len(tuple(shape)) != 1:
        raise tracer.refuse("it normalises over more than the last axis")
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32

    def widen(t: Tensor) -> Node:
        node = tracer.node_of(t)
        return node if t.dtype is dtype else tracer.graph.cast(node, dtype)  # type: ignore

    return widen(x), widen


_COMPOSITES: dict[Any, Any] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
}
"""Functions that torch decomposes differently on different devices and in different releases."""


def _map(function: Callable[[Tensor], Any], value: Any) -> Any:
    """``value`` with ``function`` applied to each tensor in it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, _Sizes):
        return "sizes"
    if isinstance(value, (list, tuple)):
        return (
            type(value)(_map(function, v) for v in value) if type(value) in (list, tuple) else value
        )
    if isinstance(value, dict):
        return {k: _map(function, v) for k, v in value.items()}
    return value


@contextmanager
def without_modes() -> Iterator[None]:
    """Suspend the caller's modes, such as ``with torch.device(...)``: a formula must not depend on where ``wrap`` is called."""
    count = torch._C._len_torch_function_stack()
    suspended = [torch._C._pop_torch_function_stack() for _ in range(count)]
    try:
        with _disable_current_modes():
            yield
    finally:
        for mode in reversed(suspended):
            torch._C._push_on_torch_function_stack(mode)
