"""Recognises gated MLPs and their activations."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

from peftkit.fuse.plan import Reason
from peftkit.fuse.recognise.graph import Graph, Node
from peftkit.fuse.recognise.trace import Kind, Leaf, trace
from peftkit.fuse.recognise.verdict import examine
from peftkit.fuse.seal import Seal
from peftkit_kernels.ops.lora_swiglu_mlp import ACTIVATIONS


def seal_gated_mlp(module: nn.Module, names: Sequence[str]) -> Seal:
    """The seal of ``module``: its activation if it computes ``down(act(gate(x)) ∘ up(x))`` and the op has this activation, or a reason.

    Args:
        module: Any module.
        names: Names of children: gate, up and down, or the joint gate-and-up projection (gate first) and down.
    """
    find = functools.partial(seal_gated_mlp, names=tuple(names))
    leaves = {}
    for name in names:
        sizes = _sizes(module._modules.get(name))
        if sizes is None:
            return Seal(Reason(f"its {name} is no linear layer"), find)
        leaves[name] = Leaf(name, *sizes)
    width = leaves[names[0]].size_in
    key = "gated MLP", *(tuple(vars(leaf).values()) for leaf in leaves.values())

    def answer(kind: Kind) -> str | Reason:
        return _activation(module, kind, tuple(names), width, leaves)

    return examine(key, module, answer, find, skip=leaves)


def _sizes(linear: Any) -> tuple[int, int] | None:
    """The numbers of input and output features of a linear, with or without an adapter around it."""
    if isinstance(linear, nn.Module) and hasattr(linear, "get_base_layer"):
        linear = linear.get_base_layer()
    size_in = getattr(linear, "in_features", None)
    size_out = getattr(linear, "out_features", None)
    return (size_in, size_out) if type(size_in) is int and type(size_out) is int else None


def _activation(
    module: nn.Module, kind: Kind, names: tuple[str, ...], width: int, leaves: dict[str, Leaf]
) -> str | Reason:
    kind.reads.add_attribute(nn.Linear, "forward")
    kind.reads.add_attribute(nn.Module, "__call__")
    common, other, foreign = set(ACTIVATIONS), None, []
    for _, graph, out in trace(module, kind, width, leaves):
        gate, up = _halves(graph, names, leaves)
        found = {
            act for act in ACTIVATIONS if _node(graph, names, graph.node(act, gate), up) is out
        }
        if not found and other is None:
            other = _other_activation(graph, out, names, up)
        common &= found
        foreign += graph.foreign(out)
    if common:
        return common.pop()
    if other is not None:
        return Reason(
            f"its activation ({_activation_name(kind, names) or other}) has no fused form"
        )
    uses = f" (it uses {', '.join(dict.fromkeys(foreign))})" if foreign else ""
    return Reason(f"its forward is not down(act(gate(x)) * up(x)){uses}")


def _halves(graph: Graph, names: tuple[str, ...], leaves: dict[str, Leaf]) -> tuple[Node, Node]:
    x = graph.node("x")
    if len(names) == 3:
        return graph.node("linear", names[0], x), graph.node("linear", names[1], x)
    joint, size = graph.node("linear", names[0], x), leaves[names[0]].size_out // 2
    return graph.part(joint, 0, size), graph.part(joint, size, 2 * size)


def _node(graph: Graph, names: tuple[str, ...], gate: Node, up: Node) -> Node:
    return graph.node("linear", names[-1], graph.mul(gate, up))


def _other_activation(graph: Graph, out: Node, names: tuple[str, ...], up: Node) -> str | None:
    """The last operation of an unknown activation, if everything else is the formula of a gated MLP; otherwise ``None``."""
    found = (node for node in graph.nodes if _node(graph, names, node, up) is out)
    node = next(found, None)
    return None if node is None else node.op


def _activation_name(kind: Kind, names: tuple[str, ...]) -> str | None:
    return next((cls.__name__ for path, cls in kind.classes.items() if path), None)
