"""Traces a module's own forward into a graph. It runs on a stand-in, so the module, its hooks and its parameters are not touched.

The trace runs on the CPU in every floating dtype, and again in the other modes (training and evaluation, with and without gradients,
under autocast). A forward is refused if it differs in one of these modes, if it depends on the values or leading sizes of its
input, or if it reads anything that could change undetected.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.fuse.recognise.graph import Graph, Node
from peftkit.fuse.recognise.modes import Called, Dispatched
from peftkit.fuse.recognise.reads import Reads, Refused
from peftkit.fuse.recognise.stand_ins import stand_in_for
from peftkit.swap import own_class

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LEADING = {
    torch.float32: (2, 3),
    torch.bfloat16: (5,),
    torch.float16: (2, 1, 3),
    torch.float64: (3, 2),
}
"""Leading sizes of the input by dtype. The number of axes differs, to detect a forward that numbers its axes from the front."""

_MODES = (
    (torch.bfloat16, False, True, False),
    (torch.bfloat16, True, True, True),
    (torch.bfloat16, False, False, True),
    (torch.float32, False, True, True),
)
"""Dtype, training, gradients and autocast of the further traces. The first traces run in training without gradients and autocast."""

Path = tuple[str, ...]


@dataclass
class Kind:
    """Everything that a forward relies on, as found by the traces.

    Attributes:
        reads: Names that the code reads.
        classes: By path, the class of the module and of each submodule that it calls.
        settings: By path, the attributes that the forward reads, with their values.
        composites: Names of called functions of torch that compute a whole norm.
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
        kind: Receives what the forward reads.
        width: Number of features of the input.
        leaves: Children that are traced as one operation, by name.

    Raises:
        Refused: The forward does something that no known module does. Any other exception is the forward's own.
    """
    logs = {}
    for dtype in DTYPES:
        graph = Graph()
        tracer = Tracer(kind, graph, dtype, leaves, training=True, grad=False, autocast=False)
        out = tracer.run(module, width)
        logs[dtype] = tracer.log
        yield dtype, graph, out
    for dtype, training, grad, autocast in _MODES:
        tracer = Tracer(kind, None, dtype, leaves, training, grad, autocast)
        tracer.run(module, width)
        if tracer.log != logs[dtype]:
            raise Refused(
                "its forward differs between training and evaluation, with and without gradients, or under autocast"
            )


class Tracer:
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
            stand_in = stand_in_for(module, (), self)
            try:
                with Dispatched(self), Called(self):
                    out = own_class(module).forward(stand_in, x)
            except Exception as error:
                raise self.refused or error  # noqa: B904  the first refusal caused this error
        if self.refused is not None:
            raise self.refused
        if not isinstance(out, Tensor):
            raise Refused(f"its forward returns a {type(out).__name__}")
        self.log.append(("returns", self.place(out)))
        return None if self.graph is None else self.node_of(out)

    def refuse(self, reason: str) -> Refused:
        """The exception to raise. It is also kept, because the forward may catch it."""
        self.refused = self.refused or Refused(reason)
        return self.refused

    def name(self, tensor: Tensor, op: str, *args: Any) -> None:
        """Give a tensor a new node."""
        if self.graph is not None:
            self.keep(tensor, self.graph.node(op, *args))
        self.place(tensor)

    def keep(self, tensor: Tensor, node: Node) -> None:
        """Record that ``node`` computes ``tensor``."""
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)

    def node_of(self, tensor: Tensor) -> Node:
        """The node of a tensor. A tensor that this trace did not make gets a new node."""
        if id(tensor) not in self._nodes and self.graph is not None:
            self.name(tensor, "unknown tensor", len(self._nodes))
        return self._nodes[id(tensor)]

    def place(self, tensor: Tensor) -> int:
        """The number of a tensor in the order of first use."""
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
        """Raise ``Refused`` if the forward has switched gradients or autocast on or off."""
        if torch.is_grad_enabled() is not self.grad:
            raise self.refuse("part of its forward runs with gradients switched on or off")
        if any(torch.is_autocast_enabled(d) is not self.autocast for d in ("cpu", "cuda")):
            raise self.refuse("part of its forward runs with autocast switched on or off")

    def leaf(self, leaf: Leaf, x: Any) -> Tensor:
        """The output of a linear, as a new node."""
        self.check_modes()
        if not isinstance(x, Tensor) or x.shape[-1] != leaf.size_in or x.dtype is not self.dtype:
            raise self.refuse(f"{leaf.name} is called on an input of another width or dtype")
        with self.pause():
            shape = (*x.shape[:-1], leaf.size_out)
            out = torch.zeros(shape, dtype=x.dtype, device="cpu", requires_grad=self.grad)
        self.log.append(("linear", leaf.name, self.place(x)))
        if self.graph is not None:
            self.name(out, "linear", leaf.name, self.node_of(x))
        self.place(out)
        return out

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Keep a refusal that is raised in this block, because the forward may catch it."""
        try:
            yield
        except Refused as refused:
            self.refused = self.refused or refused
            raise

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Do not trace the operations in this block; the tracer itself runs them."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before


@contextmanager
def _settings(grad: bool, autocast: bool) -> Iterator[None]:
    """Set the modes of one run; restore them and torch's random state afterwards."""
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
