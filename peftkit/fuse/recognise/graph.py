"""The aten graph of a forward in a canonical form. Two forwards with the same computation and casts have the same output node.

A node is an operation with its arguments. Equal operations on equal arguments are one object, so two formulas are equal if their nodes
are the same object. The canonical form uses these equalities and no others:

- ``a * b = b * a`` and ``a + b = b + a`` (the same bits), ``x * x = x ** 2``, ``x * 1 = x``;
- an operation on two dtypes casts both operands to the dtype of the result first, as torch does;
- ``rsqrt(v)``, ``v ** -0.5`` and ``1 / sqrt(v)`` are the same, ``a / sqrt(v)`` is ``a * rsqrt(v)``, and a sum divided by the number of
  its elements is their mean. These differ by one rounding in their dtype, which the formulas of ``peftkit_kernels`` do not specify;
- ``var(x, correction=0)`` is the mean of the squared distances from the mean.

Any other difference, such as another order of factors or casts, gives another node.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_WHOLE = 2**63 - 1


class Node:
    """One operation on nodes and constants. Equal operations are the same object."""

    __slots__ = ("args", "index", "op")

    def __init__(self, op: str, args: tuple[Any, ...], index: int):
        self.op, self.args, self.index = op, args, index


class Graph:
    """The nodes of one trace, and of the formulas with which the trace is compared."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[Any, ...], Node] = {}

    @property
    def nodes(self) -> list[Node]:
        """All nodes, each after its arguments."""
        return list(self._nodes.values())

    def constants(self, op: str) -> list[float]:
        """The numbers that are arguments of an operation ``op``."""
        found = (a for node in self._nodes.values() if node.op == op for a in node.args)
        return list(dict.fromkeys(a for a in found if isinstance(a, float)))

    def foreign(self, out: Node) -> list[str]:
        """Names of the aten operations that ``out`` depends on and that no known formula uses."""
        seen: set[Node] = set()
        found, left = [], [out]
        while left:
            node = left.pop()
            if node not in seen:
                seen.add(node)
                left += [a for a in node.args if isinstance(a, Node)]
                if node.op.startswith("aten."):
                    found.append(node.op.split(".")[1])
        return found

    def node(self, op: str, *args: Any) -> Node:
        """The node of ``op`` on nodes and constants. An integer is treated as the equal float."""
        args = tuple(_constant(a) for a in args)
        key = (op, *(a if isinstance(a, Node) else (type(a), repr(a)) for a in args))
        found = self._nodes.get(key)
        if found is None:
            found = self._nodes[key] = Node(op, args, len(self._nodes))
        return found

    def cast(self, x: Node, dtype: torch.dtype) -> Node:
        """``x`` rounded to ``dtype``."""
        return self.node("cast", x, dtype)

    def add(self, a: Any, b: Any) -> Node:
        """``a + b``."""
        return self.node("add", *_ordered(a, b))

    def sub(self, a: Any, b: Any) -> Node:
        """``a - b``."""
        return self.node("sub", a, b)

    def mul(self, a: Any, b: Any) -> Node:
        """``a * b``."""
        if a is b:
            return self.square(a)
        for one, other in ((a, b), (b, a)):
            if isinstance(other, Node) and isinstance(one, (int, float)) and one == 1:
                return other
        return self.node("mul", *_ordered(a, b))

    def div(self, a: Any, b: Any, size: int = 0) -> Node:
        """``a / b``. If ``a`` is a sum, ``size`` is the number of its terms."""
        if isinstance(b, Node) and b.op == "sqrt":
            root = self.rsqrt(b.args[0])
            return root if _is_one(a) else self.mul(a, root)
        if isinstance(a, Node) and a.op == "sum" and not isinstance(b, Node) and b == size:
            return self.mean(a.args[0])
        return self.node("div", a, b)

    def square(self, x: Node) -> Node:
        """``x²``."""
        return self.node("square", x)

    def mean(self, x: Node) -> Node:
        """The mean over the last axis, which is kept with size 1."""
        return self.node("mean", x)

    def rsqrt(self, x: Node) -> Node:
        """``1 / √x``."""
        return self.node("rsqrt", x)

    def variance(self, x: Node) -> Node:
        """The biased variance over the last axis, which is kept with size 1."""
        return self.mean(self.square(self.sub(x, self.mean(x))))

    def part(self, x: Node, start: int, stop: int) -> Node:
        """The elements ``start`` to ``stop`` of the last axis, which has more elements than these."""
        return self.node("part", x, start, stop)

    def add_call(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Any:
        """The nodes of the results of one aten operation.

        Args:
            func: The overload.
            args: Its arguments; each tensor is a ``Traced``.
            kwargs: Its keyword arguments.
            out: Its result.

        Returns:
            A node for a tensor, a list of nodes for a list of tensors.
        """
        name = func.overloadpacket.__name__
        rule = _RULES.get(name)
        if rule is not None:
            result = rule(self, out, *args, **kwargs)
            if result is not None:
                return result
        flat = [_plain(a) for a in (*args, *(x for item in sorted(kwargs.items()) for x in item))]
        node = self.node(str(func), *flat)
        if isinstance(out, Tensor):
            return node
        return [self.node("item", node, i) for i in range(len(out))]


class Traced:
    """A tensor argument of an operation, with its node."""

    __slots__ = ("node", "tensor")

    def __init__(self, node: Node, tensor: Tensor):
        self.node, self.tensor = node, tensor


def _constant(a: Any) -> Any:
    return float(a) if type(a) is int else a


def _is_one(a: Any) -> bool:
    return isinstance(a, (int, float)) and a == 1


def _ordered(a: Any, b: Any) -> tuple[Any, Any]:
    """Two operands in a fixed order: nodes by age, constants last."""
    key = [x.index if isinstance(x, Node) else float("inf") for x in (a, b)]
    return (a, b) if key[0] <= key[1] else (b, a)


def _plain(a: Any) -> Any:
    if isinstance(a, Traced):
        return a.node
    if isinstance(a, (list, tuple)):
        return tuple(("node", x.node.index) if isinstance(x, Traced) else _plain(x) for x in a)
    return a


def _is_last(x: Traced, dim: Any) -> bool:
    if isinstance(dim, (list, tuple)):
        return len(dim) == 1 and _is_last(x, dim[0])
    return dim in (-1, x.tensor.dim() - 1)


def _operands(graph: Graph, out: Tensor, args: Sequence[Any]) -> list[Any]:
    """The operands of an element-wise operation, each cast to the dtype of the result."""
    return [
        a
        if not isinstance(a, Traced)
        else a.node
        if a.tensor.dtype is out.dtype
        else graph.cast(a.node, out.dtype)
        for a in args
    ]


def _cast(graph: Graph, out: Tensor, x: Traced, **_: Any) -> Node:
    return x.node if x.tensor.dtype is out.dtype else graph.cast(x.node, out.dtype)


def _add(graph: Graph, out: Tensor, a: Any, b: Any, alpha: float = 1) -> Node | None:
    return graph.add(*_operands(graph, out, (a, b))) if alpha == 1 else None


def _sub(graph: Graph, out: Tensor, a: Any, b: Any, alpha: float = 1) -> Node | None:
    return graph.sub(*_operands(graph, out, (a, b))) if alpha == 1 else None


def _mul(graph: Graph, out: Tensor, a: Any, b: Any) -> Node:
    return graph.mul(*_operands(graph, out, (a, b)))


def _div(graph: Graph, out: Tensor, a: Any, b: Any, rounding_mode: Any = None) -> Node | None:
    if rounding_mode is not None:
        return None
    size = 0
    if isinstance(a, Traced) and a.node.op == "sum":
        size = int(a.node.args[1])
    return graph.div(*_operands(graph, out, (a, b)), size=size)


def _pow(graph: Graph, out: Tensor, x: Any, exponent: Any) -> Node | None:
    if not isinstance(x, Traced) or isinstance(exponent, Traced):
        return None
    if exponent == 2:
        return graph.square(x.node)
    if exponent == -0.5:
        return graph.rsqrt(x.node)
    return graph.node("sqrt", x.node) if exponent == 0.5 else None


def _reciprocal(graph: Graph, out: Tensor, x: Traced) -> Node | None:
    return graph.rsqrt(x.node.args[0]) if x.node.op == "sqrt" else None


def _mean(graph: Graph, out: Tensor, x: Traced, dim: Any = None, keepdim: bool = False, **k: Any):
    if not _is_last(x, dim) or k.get("dtype") not in (None, x.tensor.dtype):
        return None
    return graph.mean(x.node) if keepdim else graph.node("mean without axis", x.node)


def _sum(graph: Graph, out: Tensor, x: Traced, dim: Any = None, keepdim: bool = False, **k: Any):
    if not _is_last(x, dim) or not keepdim or k.get("dtype") not in (None, x.tensor.dtype):
        return None
    return graph.node("sum", x.node, x.tensor.shape[-1])


def _var(graph: Graph, out: Tensor, x: Traced, dim: Any = None, correction: Any = 1, keepdim=False):
    return graph.variance(x.node) if _is_last(x, dim) and correction == 0 and keepdim else None


def _unsqueeze(graph: Graph, out: Tensor, x: Traced, dim: int) -> Node | None:
    last = dim in (-1, out.dim() - 1)
    return graph.mean(x.node.args[0]) if last and x.node.op == "mean without axis" else None


def _gelu(graph: Graph, out: Tensor, x: Traced, approximate: str = "none") -> Node:
    return graph.node("gelu_tanh" if approximate == "tanh" else "gelu", x.node)


def _slice(graph: Graph, out: Tensor, x: Traced, dim=0, start=None, end=None, step=1):
    size = x.tensor.shape[-1]
    start, end = start or 0, size if end is None or end == _WHOLE else end
    if not _is_last(x, dim) or step != 1 or not 0 <= start < end <= size:
        return None
    return x.node if (start, end) == (0, size) else graph.part(x.node, start, end)


def _split(graph: Graph, out: Any, x: Traced, sizes: Any, dim: int = 0) -> list[Node] | None:
    if not _is_last(x, dim):
        return None
    parts, start = [], 0
    for one in out:
        parts.append(graph.part(x.node, start, start + one.shape[-1]))
        start += one.shape[-1]
    return parts


_RULES: dict[str, Any] = {
    "_to_copy": _cast,
    "add": _add,
    "div": _div,
    "gelu": _gelu,
    "mean": _mean,
    "mul": _mul,
    "pow": _pow,
    "reciprocal": _reciprocal,
    "rsqrt": lambda graph, out, x: graph.rsqrt(x.node),
    "silu": lambda graph, out, x: graph.node("silu", x.node),
    "slice": _slice,
    "split": _split,
    "split_with_sizes": _split,
    "sqrt": lambda graph, out, x: graph.node("sqrt", x.node),
    "sub": _sub,
    "sum": _sum,
    "unsqueeze": _unsqueeze,
    "var": _var,
}
