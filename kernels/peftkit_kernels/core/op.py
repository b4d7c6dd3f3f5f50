"""Declares an op to torch: as a ``torch.library`` op, which tracers record, and by launch plans for eager calls.

``torch.compile`` and other tracers see one opaque operation. An eager call does not pay for torch.library's dispatch: its autograd
function calls the schedule's launch plan.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from peftkit_kernels.core.autograd import once_differentiable
from peftkit_kernels.core.checks import is_autocast_enabled
from peftkit_kernels.core.launch import is_counting, is_recording
from peftkit_kernels.core.modes import is_transformed
from peftkit_kernels.core.plan import Kind, Plans

_SEEDS = "seed", "seeds"

Keep = Callable[[Any, Sequence[Any], Any], None]
Backward = Callable[..., Sequence[Any]]


def replays(x: Tensor) -> bool:
    """Whether ops with the input ``x`` run by launch plans, on arguments as they are: eagerly, on a GPU, without autocast."""
    return (
        not is_transformed()
        and (x.is_cuda or is_counting())
        and not is_autocast_enabled(x.device.type)
    )


class Op:
    """A schedule as an op without gradient. Calling it runs the schedule.

    Args:
        name: The name in the namespace ``peftkit``.
        schema: Its arguments and results, in torch's notation. Integers named ``seed`` or ``seeds`` are seeds of dropout masks.
        schedule: The function that computes it. It changes none of its arguments.
        fake: The same on tensors that have shapes but no values.
        looks_at_storage: Names of the arguments of which the schedule asks whether they are parts of one buffer.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        schedule: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        looks_at_storage: Sequence[str] = (),
    ):
        self.name, self._schedule = name, schedule
        self.library = torch.library.custom_op(
            f"peftkit::{name}", _without_aliases(schedule), mutates_args=(), schema=schema
        )
        self.library.register_fake(fake)
        parsed = torch._C.parse_schema(name + schema)
        self.arguments = [argument.name for argument in parsed.arguments]
        self.kinds = [_kind(a) for a in parsed.arguments]
        self.results = [_kind(a) for a in parsed.returns]
        places = [self.arguments.index(argument) for argument in looks_at_storage]
        self.plans = Plans(schedule, self.kinds, otherwise=self.library, looks_at_storage=places)

    def __call__(self, *args: Any) -> Any:
        """The result of the schedule. Autograd does not see the call."""
        if is_transformed():
            return self.library(*args)
        return self.compute(*args)

    def compute(self, *args: Any) -> Any:
        """The result of the schedule, for an eager call."""
        return self._schedule(*args) if is_recording() else self.plans(*args)


def _without_aliases(schedule: Callable[..., Any]) -> Callable[..., Any]:
    """The schedule with results that share no memory, as torch.library demands."""

    @functools.wraps(schedule)
    def run(*args: Any) -> Any:
        result = schedule(*args)
        if not isinstance(result, (tuple, list)):
            return result
        seen: set[int] = set()
        return tree_map_only(Tensor, lambda t: _own(t, seen), result)

    return run


def _own(t: Tensor, seen: set[int]) -> Tensor:
    """``t``, or a copy of it if it shares memory with an earlier result."""
    storage = t.untyped_storage()._cdata
    if storage in seen:
        return t.clone()
    seen.add(storage)
    return t


def _kind(argument: Any) -> Kind:
    kind = str(argument.type)
    role = "tensor" if "Tensor" in kind else "seed" if argument.name in _SEEDS else "value"
    return Kind(role, kind.startswith("List["))


class Differentiable:
    """An op with its gradient. Calling it returns the op's first result; the other results are for its backward.

    Args:
        op: The forward.
        trained: Names of the arguments that may need a gradient, in the order of the schema: tensors, or lists of tensors.
        keep: ``keep(ctx, inputs, output)`` saves what backward needs, as for ``register_autograd`` of torch.library.
        backward: ``backward(ctx, needs, grad)`` returns a gradient or ``None`` for each trained argument, and a list of them for
            a list. ``needs`` says for each of them whether its gradient is needed. ``grad`` is a list if the first result is.
            It may be called once.
    """

    def __init__(self, op: Op, trained: Sequence[str], keep: Keep, backward: Backward):
        self.op = op
        self._returns_tuple = len(op.results) > 1
        self._places = [op.arguments.index(name) for name in trained]
        _register(op, self._places, keep, backward)
        lists = [op.kinds[i].is_list for i in self._places]
        starred = [f"{'*' * is_list}a[{i}]" for i, is_list in zip(self._places, lists, strict=True)]
        self._leaves: Callable[..., tuple] = eval(f"lambda a: ({', '.join(starred)},)")
        self._frozen: Callable[..., bool] = eval(_frozen_source(op.kinds, self._places))
        self._apply = _function(op, self._places, keep, backward)

    def __call__(self, *args: Any) -> Any:
        """The op's first result, with its gradient."""
        if is_transformed():
            return self._first(self.op.library(*args))
        return self._run(self.op.compute, args)

    def again(self, *args: Any) -> Any:
        """The result if an equal call has run before, else ``None``. To be called where ``replays`` is true.

        Whoever has checked the arguments of the first call need not check those of an equal one: the two differ only in the
        values of tensors.
        """
        if not self._frozen(args):
            return None
        plan = self.op.plans.find(args)
        return None if plan is None else self._run(plan, args)

    def _run(self, compute: Callable[..., Any], args: tuple) -> Any:
        if not torch.is_grad_enabled():
            return self._first(compute(*args))
        return self._apply(compute, args, *self._leaves(args))

    def _first(self, output: Any) -> Any:
        return output[0] if self._returns_tuple else output


def _frozen_source(kinds: Sequence[Kind], trained: Sequence[int]) -> str:
    """The source of a function of an op's arguments: whether none of those that are not trained requires a gradient."""
    terms = []
    for i, kind in enumerate(kinds):
        if kind.role != "tensor" or i in trained:
            continue
        if kind.is_list:
            terms.append(f"any([t is not None and t.requires_grad for t in a[{i}]])")
        else:
            terms.append(f"(a[{i}] is not None and a[{i}].requires_grad)")
    return f"lambda a: not ({' or '.join(terms) or 'False'})"


def _function(op: Op, places: Sequence[int], keep: Keep, backward: Backward) -> Callable[..., Any]:
    """The ``apply`` of the op's autograd function for eager calls.

    Its arguments are the function that computes the op, the op's arguments, and once more those tensors among them that may need
    a gradient: torch looks for them only at the top level.
    """
    is_list, returns_tuple = op.results[0].is_list, len(op.results) > 1
    has_lists = any(op.kinds[i].is_list for i in places)

    def forward(ctx: Any, compute: Callable[..., Any], args: tuple, *leaves: Any) -> Any:
        output = compute(*args)
        ctx.set_materialize_grads(False)
        keep(ctx, args, output)
        if has_lists:
            ctx.op_counts = tuple(len(args[i]) if op.kinds[i].is_list else 0 for i in places)
        result = output[0] if returns_tuple else output
        return tuple(result) if is_list else result

    def grads(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[2:]
        if has_lists:
            needs = _nest(op, tuple(places), ctx.op_counts)(needs)
        found = backward(ctx, needs, list(grads) if is_list else grads[0])
        if not has_lists:
            return None, None, *found
        flat: list[Any] = [None, None]
        for i, part in zip(places, found, strict=True):
            flat.extend(part) if op.kinds[i].is_list else flat.append(part)
        return tuple(flat)

    methods = {
        "forward": staticmethod(forward),
        "backward": staticmethod(once_differentiable(grads)),
    }
    function = type(op.name, (torch.autograd.Function,), methods)
    # Function.apply itself would look for transforms once more
    return super(torch.autograd.Function, function).apply  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def _nest(op: Op, places: tuple[int, ...], counts: tuple[int, ...]) -> Callable[..., tuple]:
    """A function that parts a flat sequence into one entry for each of an op's arguments: a slice for a list."""
    parts, at = [], 0
    for i, count in zip(places, counts, strict=True):
        size = count if op.kinds[i].is_list else 1
        parts.append(f"f[{at}:{at + size}]" if op.kinds[i].is_list else f"f[{at}]")
        at += size
    return eval(f"lambda f: ({', '.join(parts)},)")


def _register(op: Op, places: Sequence[int], keep: Keep, backward: Backward) -> None:
    """Give the torch.library op its gradient."""

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(*_flatten(output[1:]))
        ctx.op_counts = [
            len(a) if kind.is_list else 0 for a, kind in zip(inputs, op.kinds, strict=True)
        ]
        keep(ctx, inputs, output)

    def grads(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        found = iter(backward(ctx, [ctx.needs_input_grad[i] for i in places], grads[0]))
        complete: list[Any] = []
        for i, (kind, count) in enumerate(zip(op.kinds, ctx.op_counts, strict=True)):
            if i in places:
                complete.append(next(found))
            elif kind.is_list and (kind.role == "tensor" or not count):
                # torch.library treats an empty list of numbers as a list of tensors
                complete.append([None] * count)
            else:
                complete.append(None)
        return tuple(complete)

    op.library.register_autograd(once_differentiable(grads), setup_context=setup)


def _flatten(parts: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for part in parts:
        found.extend(part) if isinstance(part, list) else found.append(part)
    return found
