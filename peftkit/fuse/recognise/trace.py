"""The graph of a module's own forward, traced on a stand-in so that the module, its hooks and its parameters are not touched.

The stand-in has the module's class and attributes, small tensors of zeros as parameters, opaque calls as linears, and writes down
each attribute that the forward reads. The trace runs on the CPU, in every floating dtype, and again in the other modes (training
and evaluation, with gradients and without, under autocast); a forward that does something else in one of them, that looks at the
values or leading sizes of its input, or that reads anything that may change unnoticed is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from peftkit.fuse.recognise.graph import Graph, Node, Traced
from peftkit.fuse.recognise.reads import Reads, Refused, is_plain
from peftkit.fuse.seal import changed_calls, own_class

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LEADING = {
    torch.float32: (2, 3),
    torch.bfloat16: (5,),
    torch.float16: (2, 1, 3),
    torch.float64: (3, 2),
}
"""Leading sizes of the input by dtype: an axis that is the last one only for one number of axes shows."""

_MODES = (
    (torch.bfloat16, False, True, False),
    (torch.bfloat16, True, True, True),
    (torch.bfloat16, False, False, True),
    (torch.float32, False, True, True),
)
"""Dtype, training, gradients, autocast: what is tried besides training without both in every dtype."""

Path = tuple[str, ...]


@dataclass
class Kind:
    """What the traces found that a forward relies on.

    Attributes:
        reads: Names that code reads.
        classes: Class of the module and of each submodule that it calls, by path.
        settings: Values of the attributes that the forward reads, by path.
        composites: Names of the functions of torch that compute a whole norm.
    """

    reads: Reads = field(default_factory=Reads)
    classes: dict[Path, type] = field(default_factory=dict)
    settings: dict[Path, dict[str, Any]] = field(default_factory=dict)
    composites: set[str] = field(default_factory=set)


@dataclass
class Leaf:
    """A child that is traced as one operation: a linear from ``size_in`` to ``size_out`` features."""

    name: str
    size_in: int
    size_out: int


def trace(
    module: nn.Module, kind: Kind, width: int, leaves: dict[str, Leaf]
) -> Iterator[tuple[torch.dtype, Graph, Node]]:
    """The graph of ``module(x)`` for ``x [..., width]`` and the node of its output, in each of ``DTYPES``.

    Args:
        module: Anything; it is not called and not changed.
        kind: Filled with what the forward reads.
        width: Features of the input.
        leaves: Children that are traced as one operation, by name.

    Raises:
        Refused: The forward does what no known module does. Any other exception is the forward's own.
    """
    logs = {}
    for dtype in DTYPES:
        graph = Graph()
        tracer = _Tracer(kind, graph, dtype, leaves, training=True, grad=False, autocast=False)
        out = tracer.run(module, width)
        logs[dtype] = tracer.log
        yield dtype, graph, out
    for dtype, training, grad, autocast in _MODES:
        tracer = _Tracer(kind, None, dtype, leaves, training, grad, autocast)
        tracer.run(module, width)
        if tracer.log != logs[dtype]:
            raise Refused(
                "its forward differs between training and evaluation, with and without gradients, or under autocast"
            )


class _Tracer:
    """One run of a forward on stand-ins."""

    def __init__(
        self,
        kind: Kind,
        graph: Graph | None,
        dtype: torch.dtype,
        leaves: dict[str, Leaf],
        training: bool,
        grad: bool,
        autocast: bool,
    ):
        self.kind, self.graph, self.dtype, self.leaves = kind, graph, dtype, leaves
        self.training, self.grad, self.autocast = training, grad, autocast
        self.log: list[Any] = []
        self.refused: Refused | None = None
        self.paused = False
        self._nodes: dict[int, Node] = {}
        self._order: dict[int, int] = {}
        self._alive: list[Tensor] = []

    def run(self, module: nn.Module, width: int) -> Any:
        """The node of the output; ``None`` without a graph."""
        shape = (*_LEADING[self.dtype], width)
        with _settings(self.grad, self.autocast):
            x = torch.ones(shape, dtype=self.dtype, device="cpu", requires_grad=self.grad)
            self.name(x, "x")
            shell = make_shell(module, (), self)
            with _Dispatched(self), _Called(self):
                out = own_class(module).forward(shell, x)
        if self.refused is not None:
            raise self.refused
        if not isinstance(out, Tensor):
            raise Refused(f"its forward returns a {type(out).__name__}")
        self.log.append(("returns", self.place(out)))
        return None if self.graph is None else self._nodes.get(id(out))

    def refuse(self, reason: str) -> Refused:
        """The exception to raise; kept, in case the forward catches it."""
        self.refused = self.refused or Refused(reason)
        return self.refused

    def name(self, tensor: Tensor, op: str, *args: Any) -> None:
        """Give a tensor a node of its own."""
        if self.graph is not None:
            self.keep(tensor, self.graph.node(op, *args))
        self.place(tensor)

    def keep(self, tensor: Tensor, node: Node) -> None:
        """``tensor`` is what ``node`` computes."""
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)

    def node_of(self, tensor: Tensor) -> Node:
        """The node of a tensor; a new one for a tensor that comes from elsewhere."""
        if id(tensor) not in self._nodes and self.graph is not None:
            self.name(tensor, "unknown tensor", len(self._nodes))
        return self._nodes[id(tensor)]

    def place(self, tensor: Tensor) -> int:
        """The number of a tensor in the order in which they appear."""
        self._alive.append(tensor)
        return self._order.setdefault(id(tensor), len(self._order))

    def parameter(self, name: str, tensor: Tensor | None) -> Tensor | None:
        """A stand-in for a parameter."""
        if tensor is None:
            return None
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        with self.pause():
            zeros = torch.zeros(1, dtype=dtype, device="cpu").expand(tensor.shape)
            stand_in = nn.Parameter(zeros, requires_grad=False)
        self.name(stand_in, "parameter", name)
        return stand_in

    def check_modes(self) -> None:
        """Whether gradients and autocast are still as the caller of the forward had them."""
        if torch.is_grad_enabled() is not self.grad:
            raise self.refuse("part of its forward runs with gradients switched on or off")
        if any(torch.is_autocast_enabled(d) is not self.autocast for d in ("cpu", "cuda")):
            raise self.refuse("part of its forward runs with autocast switched on or off")

    def leaf(self, leaf: Leaf, x: Any) -> Tensor:
        """The output of a linear."""
        self.check_modes()
        if not isinstance(x, Tensor) or x.shape[-1] != leaf.size_in or x.dtype is not self.dtype:
            raise self.refuse(f"{leaf.name} is called on something else than its input")
        with self.pause():
            shape = (*x.shape[:-1], leaf.size_out)
            out = torch.zeros(shape, dtype=x.dtype, device="cpu", requires_grad=self.grad)
        self.log.append(("linear", leaf.name, self.place(x)))
        if self.graph is not None:
            self.name(out, "linear", leaf.name, self.node_of(x))
        self.place(out)
        return out

    def read(self, shell: Any, name: str) -> Any:
        """An attribute of a stand-in."""
        state: dict[str, Any] = object.__getattribute__(shell, "__dict__")
        path, cls = state["_peftkit_path"], state["_peftkit_class"]
        if name == "training":
            return self.training
        if name == "__class__":
            return cls
        if name.startswith("__"):
            raise self.refuse(f"its forward reads {name}")
        if name in state["_parameters"]:
            return state["_parameters"][name]
        if name in state["_modules"]:
            return self.child(state["_modules"], name, path)
        if name in state["_buffers"]:
            raise self.refuse(f"its forward reads the buffer {name}")
        if name in state and not isinstance(getattr(cls, name, None), property):
            value = state[name]
            if not is_plain(value):
                raise self.refuse(
                    f"its forward reads {name}, a {type(value).__name__} whose contents may change"
                )
            self.kind.settings[path][name] = value
            self.read_functions(value)
            return value
        if not hasattr(cls, name):
            raise self.refuse(f"its forward reads {name}, which it does not have")
        self.kind.reads.add_attribute(cls, name)
        return object.__getattribute__(shell, name)

    def read_functions(self, value: Any) -> None:
        """A setting that can be called is code too."""
        if isinstance(value, functools.partial):
            value = value.func
        self.kind.reads.add_value("a setting", value)

    def child(self, children: dict[str, Any], name: str, path: Path) -> Any:
        """A stand-in for a submodule, made when it is first read."""
        child = children[name]
        if not path and name in self.leaves and not isinstance(child, _Leaf):
            child = children[name] = _Leaf(self, self.leaves[name])
        elif isinstance(child, nn.Module) and not isinstance(child, _Recording):
            child = children[name] = make_shell(child, (*path, name), self)
        return child

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Work of the tracer itself."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before


class _Leaf:
    """A linear: may be called, and has nothing that may be read."""

    def __init__(self, tracer: _Tracer, leaf: Leaf):
        self.__call = functools.partial(tracer.leaf, leaf)

    def __call__(self, x: Any) -> Tensor:
        return self.__call(x)


class _Recording:
    """Mixed into a class: attributes are recorded, and cannot be set."""

    def __getattribute__(self, name: str) -> Any:
        state = object.__getattribute__(self, "__dict__")
        return state["_peftkit_tracer"].read(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        tracer = object.__getattribute__(self, "__dict__")["_peftkit_tracer"]
        raise tracer.refuse(f"its forward sets its own {name}")

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


@functools.lru_cache(maxsize=256)
def _shell_class(cls: type) -> type:
    return type(cls.__name__, (_Recording, cls), {})


def make_shell(module: nn.Module, path: Path, tracer: _Tracer) -> Any:
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
    tracer.kind.reads.add_attribute(cls, "forward")
    shell: Any = object.__new__(_shell_class(cls))
    own = object.__getattribute__(shell, "__dict__")
    own.update(state)
    own["_parameters"] = {
        n: tracer.parameter(".".join((*path, n)), p) for n, p in state["_parameters"].items()
    }
    own["_modules"] = dict(state["_modules"])
    own.update(_peftkit_path=path, _peftkit_class=cls, _peftkit_tracer=tracer)
    return shell


@contextmanager
def _settings(grad: bool, autocast: bool) -> Iterator[None]:
    """Modes of one run; torch's generator is left as it was."""
    state = torch.get_rng_state()
    before = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    cached = torch.is_autocast_cache_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        try:
            torch.set_autocast_cache_enabled(False)
            for device in before:
                torch.set_autocast_enabled(device, autocast)
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)
            for device, enabled in before.items():
                torch.set_autocast_enabled(device, enabled)
            torch.set_rng_state(state)


class _Dispatched(TorchDispatchMode):
    """Turns each aten operation into nodes."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler to switch it off

    def __init__(self, tracer: _Tracer):
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


class _Called(TorchFunctionMode):
    """Writes down each call of a torch function, and refuses those that tell the forward about its input."""

    def __init__(self, tracer: _Tracer):
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
    """The shape of a tensor, of which the forward of a norm or an MLP may know the last one."""

    _tracer: _Tracer

    def __new__(cls, sizes: Any, tracer: _Tracer) -> _Sizes:
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
    tracer: _Tracer, out: Tensor, x: Tensor, shape: Any, weight=None, bias=None, eps=1e-5, *_: Any
) -> Node:
    """Torch computes it in float32 or wider and rounds once."""
    graph: Any = tracer.graph
    wide, widen = _wide(tracer, x, shape)
    centred = graph.sub(wide, graph.mean(wide))
    y = graph.mul(centred, graph.rsqrt(graph.add(graph.variance(wide), eps)))
    y = y if weight is None else graph.mul(y, widen(weight))
    y = y if bias is None else graph.add(y, widen(bias))
    return y if wide is tracer.node_of(x) else graph.cast(y, x.dtype)


def _rms_norm(
    tracer: _Tracer, out: Tensor, x: Tensor, shape: Any, weight=None, eps: float | None = None
) -> Node:
    """Torch computes it in float32 or wider and rounds once."""
    if eps is None:
        raise tracer.refuse("its eps depends on the dtype (None)")
    graph: Any = tracer.graph
    wide, widen = _wide(tracer, x, shape)
    y = graph.mul(wide, graph.rsqrt(graph.add(graph.mean(graph.square(wide)), eps)))
    y = y if weight is None else graph.mul(y, widen(weight))
    return y if wide is tracer.node_of(x) else graph.cast(y, x.dtype)


def _wide(tracer: _Tracer, x: Tensor, shape: Any) -> tuple[Node, Callable[[Tensor], Node]]:
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
"""Functions that torch takes apart differently by device and release."""


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
