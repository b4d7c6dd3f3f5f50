"""Declares an op to torch: as a ``torch.library`` op, which tracers record, and by launch plans for eager calls.

``torch.compile`` and other tracers see one opaque operation. An eager call does not pay for torch.library's dispatch: its autograd
function calls the schedule's launch plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core.autograd import once_differentiable
from peftkit_kernels.core.launch import is_recording
from peftkit_kernels.core.modes import is_transformed
from peftkit_kernels.core.plan import Kind, Plans

_SEEDS = "seed", "seeds"


class Op:
    """A schedule as an op without gradient. Calling it runs the schedule.

    Args:
        name: The name in the namespace ``peftkit``.
        schema: Its arguments and results, in torch's notation. Integers named ``seed`` or ``seeds`` are seeds of dropout masks.
        schedule: The function that computes it. It changes none of its arguments.
        fake: The same on tensors that have shapes but no values.
        looks_at_storage: Whether the schedule asks which of its tensors are parts of one buffer.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        schedule: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        looks_at_storage: bool = False,
    ):
        self.name, self._schedule = name, schedule
        self.library = torch.library.custom_op(
            f"peftkit::{name}", schedule, mutates_args=(), schema=schema
        )
        self.library.register_fake(fake)
        parsed = torch._C.parse_schema(name + schema)
        self.kinds = [_kind(a) for a in parsed.arguments]
        self.has_lists = any(
            kind.is_list and kind.role == "tensor"
            for kind in (*self.kinds, *(_kind(a) for a in parsed.returns))
        )
        self.plans = Plans(
            schedule, self.kinds, otherwise=self.library, looks_at_storage=looks_at_storage
        )

    def __call__(self, *args: Any) -> Any:
        """The result of the schedule. Autograd does not see the call."""
        if is_transformed():
            return self.library(*args)
        return self.compute(args)

    def compute(self, args: Sequence[Any]) -> Any:
        """The result of the schedule, for an eager call."""
        return self._schedule(*args) if is_recording() else self.plans(*args)


def _kind(argument: Any) -> Kind:
    kind = str(argument.type)
    role = "tensor" if "Tensor" in kind else "seed" if argument.name in _SEEDS else "value"
    return Kind(role, kind.startswith("List["))


def differentiable(
    op: Op, keep: Callable[..., None], backward: Callable[..., tuple[Any, ...]]
) -> Callable[..., Any]:
    """The op with its gradient: a function of the op's arguments.

    Args:
        op: The forward.
        keep: ``keep(ctx, inputs, output)`` saves what backward needs, as for ``register_autograd`` of torch.library.
        backward: ``backward(ctx, *grads)`` returns a gradient, or ``None``, for each input. It may be called once.
    """
    op.library.register_autograd(once_differentiable(backward), setup_context=keep)
    apply = _nested(op, keep, backward) if op.has_lists else _flat(op, keep, backward)

    def call(*args: Any) -> Any:
        if is_transformed():
            return op.library(*args)
        if not torch.is_grad_enabled():
            return op.compute(args)
        return apply(*args)

    return call


def _flat(op: Op, keep: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """The autograd function of an op without lists of tensors."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = op.compute(args)
        keep(ctx, args, output)
        return output

    return _function(op, forward, backward).apply


def _function(op: Op, forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    methods = {
        "forward": staticmethod(forward),
        "backward": staticmethod(once_differentiable(backward)),
    }
    return type(op.name, (torch.autograd.Function,), methods)


def _nested(op: Op, keep: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """The autograd function of an op with lists of tensors, which torch's own functions do not follow."""

    def forward(ctx: Any, layout: _Layout, *flat: Any) -> tuple[Tensor | None, ...]:
        inputs = _group(flat, layout.inputs)
        output = op.compute(inputs)
        keep(_Context(ctx, _group(ctx.needs_input_grad[1:], layout.inputs)), inputs, output)
        ctx.op_layout = layout
        parts = output if isinstance(output, tuple) else (output,)
        layout.outputs = _counts(parts)
        return tuple(_flatten(parts))

    def grads(ctx: Any, *flat: Tensor | None) -> tuple[Tensor | None, ...]:
        layout = ctx.op_layout
        nested = _Context(ctx, _group(ctx.needs_input_grad[1:], layout.inputs))
        found = backward(nested, *_group(flat, layout.outputs))
        return None, *layout.flatten_grads(found)

    function = _function(op, forward, grads)

    are_lists = [kind.role == "tensor" and kind.is_list for kind in op.kinds]

    def apply(*args: Any) -> Any:
        layout, flat = _Layout(), []
        for is_list, argument in zip(are_lists, args, strict=True):
            if is_list:
                flat.extend(argument)
                layout.inputs.append(len(argument))
            else:
                flat.append(argument)
                layout.inputs.append(None)
        results = _group(function.apply(layout, *flat), layout.outputs)
        return tuple(results) if len(results) > 1 else results[0]

    return apply


class _Context:
    """The context of an autograd function, with ``needs_input_grad`` in the form of the op's arguments."""

    def __init__(self, ctx: Any, needs_input_grad: Sequence[Any]):
        self.__dict__.update(_ctx=ctx, needs_input_grad=needs_input_grad)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._ctx, name, value)


class _Layout:
    """How many tensors each argument and each result of a call has; ``None`` for one that is not a list."""

    __slots__ = ("inputs", "outputs")

    def __init__(self) -> None:
        self.inputs: list[int | None] = []
        self.outputs: list[int | None] = []

    def flatten_grads(self, grads: Sequence[Any]) -> list[Any]:
        """The gradients of a function, from those of its op."""
        found: list[Any] = []
        for grad, count in zip(grads, self.inputs, strict=True):
            if count is None:
                found.append(grad if isinstance(grad, Tensor) else None)
            else:
                found.extend([None] * count if grad is None else grad)
        return found


def _counts(parts: Sequence[Any]) -> list[int | None]:
    return [len(part) if isinstance(part, list) else None for part in parts]


def _flatten(parts: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for part in parts:
        if isinstance(part, list):
            found.extend(part)
        else:
            found.append(part)
    return found


def _group(flat: Sequence[Any], counts: Sequence[int | None]) -> list[Any]:
    found: list[Any] = []
    at = 0
    for count in counts:
        if count is None:
            found.append(flat[at])
            at += 1
        else:
            found.append(list(flat[at : at + count]))
            at += count
    return found
