"""Linears that share an input (q/k/v). They are computed together when the first one is called."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import textwrap
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftkit.find.targets import is_cross_attention
from peftkit.fuse.adapter import Adapter, changed_reason, current_adapter
from peftkit.fuse.compute import LinearParts, backend_of, draw_seeds, linears
from peftkit.fuse.linear import FusedLoRA, different_dtypes, drop_rate
from peftkit.fuse.plan import Reason
from peftkit.swap import own_class
from peftkit_kernels.core.checks import is_autocast_enabled
from peftkit_kernels.core.dispatch import is_transformed
from peftkit_kernels.ops.lora_linear.torch_passes import joins_shrinks

METHOD = "shared input"

GROUP = "_peftkit_siblings"

_NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
"""Names of linears that attention modules call on one input, in the usual order."""

_TRANSFORMED = Reason("under torch.compile and torch.func they are computed separately")
_REPLACED = Reason("the first of them, whose call computes all, was replaced")
_INFERENCE = Reason(
    "tensors of inference mode have no version, so a change of the input could not be detected"
)


class _Pending(NamedTuple):
    """The outputs that the first sibling has computed for the others, with the input and state they are for."""

    x: Tensor
    key: tuple[Any, ...]
    outputs: dict[int, tuple[Tensor, tuple[Any, ...]]]


class Siblings:
    """LoRA linears that a module calls one after the other on the same tensor.

    The first call computes all of them. The outputs of the others are kept until they are called with the same input. A call with
    another input (in cross-attention the keys have another input) computes this sibling and those after it. A forward does not
    change the grouping, so that a recomputation under checkpointing computes exactly the same. Each thread keeps its own outputs.
    """

    def __init__(self, members: list[FusedLoRA]):
        self.members = tuple(members)
        self._thread = threading.local()

    def peftkit_plan(self, x: Tensor, first: int = 0) -> list[LinearParts] | Reason:
        """The parts of the linears from number ``first`` on, for ``x [..., K]``, or why they are computed separately."""
        if is_transformed():
            return _TRANSFORMED
        if x.is_inference():
            return _INFERENCE
        plans = []
        for member in self.members[first:]:
            parts = member.peftkit_joined(x)
            if isinstance(parts, Reason):
                return parts
            if parts.magnitude is not None and parts.lora.p:
                return Reason(
                    "DoRA with dropout cannot be fused across linears; each linear runs separately"
                )
            plans.append(parts)
        return different_dtypes(plans) or plans

    def peftkit_verdict(self, present: Sequence[nn.Module]) -> tuple[str, str]:
        """For ``explain``: the path, and the reason if the siblings run separately.

        Args:
            present: The siblings that have not been replaced by other modules.
        """
        if not any(member is self.members[0] for member in present):
            return "peft", _REPLACED
        x = self.members[0].peftkit_example()
        plans = self.peftkit_plan(x)
        return (
            ("peft", plans)
            if isinstance(plans, Reason)
            else (f"fused:{backend_of(x, plans[0])}", "")
        )

    def output_for(self, member: FusedLoRA, x: Tensor) -> Tensor | None:
        """``member(x)`` if it is computed already or the siblings can be computed together, else ``None``."""
        if is_transformed() or x.is_inference():
            return None
        pending: _Pending | None = getattr(self._thread, "pending", None)
        is_first = member is self.members[0]
        if not is_first and pending is None:
            return None
        recording = torch.is_grad_enabled()
        if is_first and not recording and x.is_cpu and self._shares_nothing(x):
            self._thread.pending = None
            return None
        key = (x._version, recording, is_autocast_enabled(x.device.type))
        if pending is not None and not is_first and pending.x is x and pending.key == key:
            return self._pop(pending, member)
        self._thread.pending = None
        return self._compute(member, x, key)

    def _compute(self, member: FusedLoRA, x: Tensor, key: tuple[Any, ...]) -> Tensor | None:
        first = next((i for i, other in enumerate(self.members) if other is member), None)
        if first is None or first == len(self.members) - 1:
            return None
        plans = self.peftkit_plan(x, first)
        if isinstance(plans, Reason):
            return None
        y, *others = linears(x, [draw_seeds(parts) for parts in plans])
        waiting = self.members[first + 1 :]
        outputs = {id(m): (o, _state(m)) for m, o in zip(waiting, others, strict=True)}
        self._thread.pending = _Pending(x, key, outputs)
        return y

    def _pop(self, pending: _Pending, member: FusedLoRA) -> Tensor | None:
        y, state = pending.outputs.pop(id(member), (None, None))
        if not pending.outputs:
            self._thread.pending = None
        if y is None or state != _state(member):
            return None
        found: Any = _adapter(member)
        return y if changed_reason(member, found) is None else None

    def _shares_nothing(self, x: Tensor) -> bool:
        """Whether a forward without gradients shares no product. Then separate calls give the same bits with less bookkeeping."""
        ranks = []
        for member in self.members:
            found = _adapter(member)
            if isinstance(found, Reason) or drop_rate(found.dropout) > 0.0:
                return False
            ranks.append(found.A.out_features)
        return not joins_shrinks(x.shape[:-1].numel(), ranks)

    def __deepcopy__(self, memo: dict[int, Any]) -> Siblings:
        # Set before the members are copied, because each member refers to this group.
        twin = memo[id(self)] = Siblings([])
        twin.members = tuple(copy.deepcopy(member, memo) for member in self.members)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.members, self._thread = state["members"], threading.local()


def group_siblings(model: nn.Module) -> int:
    """Let fused LoRA linears that share an input be computed together; returns the number of groups."""
    count = 0
    for name, parent in model.named_modules():
        if len(parent._modules) < 2:
            continue
        for known in _NAMES:
            names = tuple(n for n in known if parent._modules.get(n) is not None)
            if sum(isinstance(parent._modules[n], FusedLoRA) for n in names) < 2:
                continue
            # In cross-attention the query has its own input. This must not be decided in a forward: its recomputation under
            # checkpointing would decide otherwise.
            sharing = (
                [n for n in names if n != known[0]]
                if is_cross_attention(name, parent)
                else calls_on_one_input(own_class(parent), names)
            )
            members = [m for n in sharing if isinstance(m := parent._modules[n], FusedLoRA)]
            if len(members) > 1 and len({m.in_features for m in members}) == 1:
                group = Siblings(members)
                for member in members:
                    member.__dict__[GROUP] = group
                count += 1
    return count


@functools.cache
def calls_on_one_input(cls: type, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``names`` that the forward of ``cls`` may call on one tensor, in the order of the calls.

    The source of the forward is searched for ``self.NAME(argument)``, and assignments of the argument are followed. If there is no
    source, or it does not call all names, all names are returned. A wrong guess only costs time, because each call compares the
    input.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))
    except (OSError, TypeError, SyntaxError, AttributeError):
        return names
    assigned: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            assigned.setdefault(node.targets[0].id, []).append(node.value)
    calls: dict[str, tuple[tuple[int, int], set[str]]] = {}
    for node in ast.walk(tree):
        if (
            not isinstance(node, ast.Call)
            or not isinstance(node.func, ast.Attribute)
            or not node.args
        ):
            continue
        name, place = node.func.attr, (node.func.end_lineno or 0, node.func.end_col_offset or 0)
        if name in names:
            before, known = calls.get(name, (place, set()))
            calls[name] = min(place, before), known | _sources(node.args[0], assigned, frozenset())
    if set(calls) != set(names):
        return names
    ordered = sorted(names, key=lambda name: calls[name][0])
    best: list[str] = []
    for source in sorted({source for _, sources in calls.values() for source in sources}):
        sharing = [name for name in ordered if source in calls[name][1]]
        if len(sharing) > len(best):
            best = sharing
    return tuple(best)


def _sources(node: ast.expr, assigned: dict[str, list[ast.expr]], seen: frozenset[str]) -> set[str]:
    """The source texts of the expressions that a value may be, following assignments and conditional expressions."""
    if isinstance(node, ast.IfExp):
        return _sources(node.body, assigned, seen) | _sources(node.orelse, assigned, seen)
    if isinstance(node, ast.Name) and node.id not in seen:
        found = {node.id}
        for value in assigned.get(node.id, []):
            if isinstance(value, (ast.Name, ast.IfExp)):
                found |= _sources(value, assigned, seen | {node.id})
        return found
    return {ast.unparse(node)}


def _state(member: FusedLoRA) -> tuple[Any, ...]:
    """The state that an output depends on besides the input, such as the versions of the factors."""
    found = _adapter(member)
    if not isinstance(found, Adapter):
        return ()
    A, B = _version(found.A), _version(found.B)
    magnitude = None if found.magnitude is None else _version(found.magnitude)
    layer: Any = member
    return A, B, magnitude, layer.scaling[found.name], found.dropout.training


def _adapter(member: FusedLoRA) -> Adapter | Reason:
    return current_adapter(member, member._modules["base_layer"])  # pyright: ignore[reportArgumentType]


def _version(module: nn.Module) -> tuple[int, int | None]:
    """The identity of the weight tensor, and the number of in-place changes."""
    weight: Any = module._parameters["weight"]
    return id(weight), None if weight.is_inference() else weight._version
