"""Declares a schedule once: its autograd function, its launch plans and its torch.library ops are made from that.

A schedule is written against *passes*, a class whose methods compute its steps by torch operations or by Triton kernels. Its
arguments, what it keeps for the backward, and its gradients are named tuples (``core.structure`` says of what).

An eager call runs an autograd function. With torch passes, that runs the schedule; with Triton passes, it replays a launch plan of the
schedule (``core.plan``). ``torch.compile`` and other tracers see one opaque torch.library op.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from peftkit_kernels.core import recompute
from peftkit_kernels.core.autograd import once_differentiable
from peftkit_kernels.core.checks import is_autocast_enabled
from peftkit_kernels.core.launch import is_counting, is_recording
from peftkit_kernels.core.modes import is_transformed
from peftkit_kernels.core.namespace import library_name
from peftkit_kernels.core.plan import Kind, Plans
from peftkit_kernels.core.recorder import Constant
from peftkit_kernels.core.structure import (
    MAX_STRUCTURES,
    Flat,
    Slot,
    Structure,
    build,
    build_slots,
    decode,
    encode,
    flatten,
    register_tuples,
)

_KINDS = Kind("tensor", True), Kind("seed", True), Kind("value", False)
_cached = functools.lru_cache(MAX_STRUCTURES)

Compute = Callable[[list, list, Structure], tuple[list[Tensor], Constant]]
"""Runs a schedule on the parts of its arguments; returns the tensors of its results and their structure."""


def replays(x: Tensor) -> bool:
    """Whether ops with the input ``x`` run by launch plans, on arguments as they are: eagerly, on a GPU, without autocast."""
    return (
        not is_transformed()
        and (x.is_cuda or is_counting())
        and not is_autocast_enabled(x.device.type)
    )


class Schedule:
    """An op with its gradient. Calling it runs the schedule.

    Args:
        name: The name in the namespace ``peftkit``.
        torch_passes: A class; each run of the schedule makes an instance. ``None`` if the schedule runs on Triton only.
        triton_passes: A class with the same methods.
        forward: ``forward(P, call) -> (result, made)``, with passes ``P``. ``call`` is a named tuple whose first member is the input,
            ``result`` a tensor or a tuple of tensors, ``made`` what only the backward needs.
        keep: ``keep(call, result, made, needs)`` selects what the backward needs. It looks neither into tensors nor into stored
            weights.
        backward: ``backward(P, kept, grads, needs)`` returns the gradients in the form of ``trained``, ``None`` for those that are
            not needed. ``grads`` is that of the result, or a tuple with ``None`` for a result that was not used. A gradient may be
            one of ``grads`` itself.
        trained: ``trained(call)`` is a named tuple of the tensors that may need a gradient, with ``None`` for those that are absent.
        like: ``like(call)`` is the result of ``forward`` with Triton passes, uninitialised. It serves tracers, and calls without rows.
        like_grads: ``like_grads(kept, grads, needs)`` is the result of ``backward``, uninitialised.
        tuples: The classes of the named tuples.
        outputs: ``outputs(call)`` is the number of results if the result is a tuple.
        buffers: ``buffers(call)`` and ``buffers(kept)`` are the frozen tensors of which the schedule asks whether they are parts of one
            buffer. It may also ask that of the gradients of several results.
    """

    def __init__(
        self,
        name: str,
        torch_passes: type | None,
        triton_passes: type,
        *,
        forward: Callable[..., tuple[Any, Any]],
        keep: Callable[..., Any],
        backward: Callable[..., Any],
        trained: Callable[[Any], Any],
        like: Callable[[Any], tuple[Any, Any]],
        like_grads: Callable[..., Any],
        tuples: Sequence[type],
        outputs: Callable[[Any], int] | None = None,
        buffers: Callable[[Any], Sequence[Any]] | None = None,
    ):
        self.name = name
        self._forward, self._keep, self._backward = forward, keep, backward
        self._trained, self._like, self._like_grads = trained, like, like_grads
        self._outputs, self._buffers = outputs, buffers
        register_tuples(*tuples)
        self._structures: dict[str, tuple[Structure, tuple[int | None, ...]]] = {}
        """Of the results of a torch.library op, by the text of the structure of its arguments: their structure, and for each of
        them its place among the arguments if it is one of them. torch.library lets no op return an argument."""
        self.library = self._library_op(self.run, like, "")
        self.library_backward = self._library_op(self.run_backward, like_grads, "_backward")
        self._register_autograd()
        runs = (self.run, self.library), (self.run_backward, self.library_backward)
        self.plans, self.backward_plans = (
            Plans(
                functools.partial(run, triton_passes),
                _KINDS,
                otherwise=functools.partial(self._by_library, op),
                buffers=None if buffers is None else self._buffers_among,
            )
            for run, op in runs
        )
        self._computes: dict[str, tuple[Compute, Compute]] = {
            name: (
                functools.partial(self.run, passes),
                functools.partial(self.run_backward, passes),
            )
            for name, passes in (("torch", torch_passes), ("unplanned", triton_passes))
            if passes is not None
        }
        self._computes["triton"] = self.plans, self.backward_plans
        self._triton_passes = triton_passes
        self._function = _function(self)
        # Function.apply itself would look for transforms once more
        self._apply: Callable[..., Any] = super(torch.autograd.Function, self._function).apply  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, backend: Literal["torch", "triton"], call: Any) -> Any:
        """The schedule's result, with its gradient."""
        if not is_transformed():
            name = "unplanned" if backend == "triton" and is_recording() else backend
            return self._run(self._computes[name], flatten(call))
        if backend == "triton":
            results = self.library(*encode(call))
            return results[0] if self._outputs is None else tuple(results[: self._outputs(call)])
        flat = flatten(call)
        leaves = [flat.tensors[i] for i in self.facts_of(flat.structure).leaves]
        return self._function.apply(self._computes[backend], flat, *leaves)

    def again(self, call: Any) -> Any:
        """The result by Triton passes if an equal call has run before, else ``None``. To be called where ``replays`` is true.

        Whoever has checked the arguments of the first call need not check those of an equal one: the two differ only in the
        values of tensors.
        """
        flat = flatten(call)
        plan = self.plans.find(flat)
        if plan is None:
            return None
        tensors = flat.tensors
        if any(tensors[i].requires_grad for i in self.facts_of(flat.structure).frozen):
            return None
        return self._run((plan, self.backward_plans), flat)

    def _run(self, computes: tuple[Compute, Compute], flat: Flat) -> Any:
        if torch.is_grad_enabled():
            leaves = [flat.tensors[i] for i in self.facts_of(flat.structure).leaves]
            return self._apply(computes, flat, *leaves)
        results, made = computes[0](*flat)
        return _outputs(results, made.value)

    def run(
        self, passes: type, tensors: list, seeds: list, structure: Structure
    ) -> tuple[list[Tensor], Constant]:
        """The forward, on the parts of its arguments."""
        call = build(structure, tensors, seeds)
        if 0 in call[0].shape:
            return _zeros(self._like(call))
        found = flatten(self._forward(passes(), call))
        return found.tensors, Constant(found.structure)

    def run_backward(
        self, passes: type, tensors: list, seeds: list, structure: Structure
    ) -> tuple[list[Tensor], Constant]:
        """The backward, on the parts of its arguments."""
        kept, grads, needs = build(structure, tensors, seeds)
        every = grads if isinstance(grads, tuple) else (grads,)
        if not next(grad for grad in every if grad is not None).numel():
            return _zeros(self._like_grads(kept, grads, needs))
        found = flatten(self._backward(passes(), kept, grads, needs))
        return found.tensors, Constant(found.structure)

    def _buffers_among(self, tensors: list, seeds: list, structure: Structure) -> list[Tensor]:
        """Those tensors, of a forward's or a backward's arguments, that may be parts of one buffer."""
        return [tensors[i] for i in self._buffer_places(structure)]

    @_cached
    def _buffer_places(self, structure: Structure) -> tuple[int, ...]:
        """The places of what ``_buffers_among`` returns."""
        assert self._buffers is not None
        arguments = build_slots(structure)
        if type(arguments) is not Backward:
            return tuple(map(int, flatten(list(self._buffers(arguments))).tensors))
        grads = arguments.grads if isinstance(arguments.grads, tuple) else ()
        return tuple(map(int, flatten([*self._buffers(arguments.kept), *grads]).tensors))

    @_cached
    def facts_of(self, structure: Structure) -> _Facts:
        """What is known of all calls of this structure."""
        call = build_slots(structure)
        trained = self._trained(call)
        leaves = tuple(flatten(trained).tensors)
        frozen = tuple(i for i in flatten(call).tensors if i not in leaves)
        return _Facts(leaves, frozen, trained, call[0])

    @_cached
    def kept_of(self, structure: Structure, made: Structure, needs: tuple[bool, ...]) -> _Kept:
        """What is kept of a call.

        Args:
            structure: That of the arguments.
            made: That of the results.
            needs: Whether each leaf needs a gradient.
        """
        call, x = build_slots(structure), self.facts_of(structure).x
        result, extra = build_slots(made, len(flatten(call).tensors))
        flat = flatten(self._keep(call, result, extra, self._needs(structure, needs)))
        places = tuple(map(int, flat.tensors))
        at = places.index(x) if x in places else None
        return _Kept(flat.structure, places, tuple(map(int, flat.seeds)), at, made)

    @_cached
    def _backward_structure(
        self, structure: Structure, kept: _Kept, present: tuple[bool, ...], needs: tuple[bool, ...]
    ) -> Structure:
        """The structure of a backward's arguments; ``present`` says which of the results have a gradient."""
        marks = tuple(... if one else None for one in present)
        grads = marks[0] if _count(kept.made) is None else (tuple, *marks)
        wanted = flatten(self._needs(structure, needs)).structure.value
        return Structure.of((Backward, kept.structure.value, grads, wanted))

    def _needs(self, structure: Structure, needs: Sequence[bool]) -> Any:
        """``trained`` of a call with truth values: whether each gradient is needed."""
        facts = self.facts_of(structure)
        return _replace(facts.trained, dict(zip(facts.leaves, needs, strict=True)))

    @_cached
    def _order(self, structure: Structure, grads: Structure) -> tuple[int | None, ...]:
        """For each leaf of a call the place of its gradient among those that the backward has returned."""
        pairs = _pairs(self.facts_of(structure).trained, build_slots(grads))
        return tuple(None if grad is None else int(grad) for grad in pairs)

    def save(self, ctx: Any, call: Flat, results: Sequence[Tensor], made: Structure) -> None:
        """Keep in the context of an autograd function what the backward of a call needs."""
        tensors, seeds, structure = call
        needs = tuple([tensors[i].requires_grad for i in self.facts_of(structure).leaves])
        kept = self.kept_of(structure, made, needs)
        every = [*tensors, *results]
        saved: list[Any] = [every[i] for i in kept.places]
        ctx.recompute = None
        if kept.x is not None:
            ctx.recompute, parts = recompute.saved_for(saved[kept.x], True)
            if ctx.recompute is not None:
                del saved[kept.x]
                saved += parts
        ctx.save_for_backward(*saved)
        ctx.kept, ctx.structure = kept, structure
        ctx.seeds = [seeds[i] for i in kept.seeds]
        ctx.set_materialize_grads(False)

    def gradients(
        self, ctx: Any, compute: Compute, grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradient of each leaf that needs one, from what ``save`` has kept."""
        present = tuple([grad is not None for grad in grads])
        if not any(needs) or not any(present):
            return [None] * len(needs)
        kept: _Kept = ctx.kept
        tensors = list(ctx.saved_tensors)
        if ctx.recompute is not None and kept.x is not None:
            count = len(kept.places) - 1
            x = recompute.restore(ctx.recompute, tensors[count:])
            tensors = [*tensors[: kept.x], x, *tensors[kept.x : count]]
        tensors += [grad for grad in grads if grad is not None]
        structure = self._backward_structure(ctx.structure, kept, present, tuple(needs))
        found, made = compute(tensors, ctx.seeds, structure)
        return [None if i is None else found[i] for i in self._order(ctx.structure, made.value)]

    def _library_op(self, run: Callable[..., Any], like: Callable[..., Any], suffix: str) -> Any:
        """``run`` with Triton passes as a torch.library op without gradient."""

        def compute(
            tensors: list[Tensor], structure: str, numbers: list[float], seeds: list[int]
        ) -> list[Tensor]:
            arguments = tensors, seeds, decode(structure, numbers)
            results, made = run(self._triton_passes, *arguments)
            seen = {t.untyped_storage()._cdata for t in tensors}
            return [_own(t, seen) for t in self._new(structure, tensors, results, made.value)]

        def fake(
            tensors: list[Tensor], structure: str, numbers: list[float], seeds: list[int]
        ) -> list[Tensor]:
            arguments = build(decode(structure, numbers), tensors, seeds)
            found = like(*arguments) if type(arguments) is Backward else like(arguments)
            results, _, made = flatten(found)
            return self._new(structure, tensors, results, made)

        schema = "(Tensor[] tensors, str structure, float[] numbers, int[] seeds) -> Tensor[]"
        name = library_name(f"{self.name}{suffix}")
        op = torch.library.custom_op(name, compute, mutates_args=(), schema=schema)
        op.register_fake(fake)
        return op

    def _new(
        self, text: str, tensors: Sequence[Tensor], results: Sequence[Tensor], made: Structure
    ) -> list[Tensor]:
        """Those results of a torch.library op that are not among its arguments ``tensors``; notes where the others are."""
        places = tuple(next((i for i, t in enumerate(tensors) if t is y), None) for y in results)
        self._structures[text] = made, places
        return [y for y, place in zip(results, places, strict=True) if place is None]

    def _by_library(
        self, op: Any, tensors: list, seeds: list, structure: Structure
    ) -> tuple[list[Tensor], Constant]:
        """As ``run`` or ``run_backward``, by the torch.library op."""
        arguments = encode(build(structure, tensors, seeds))
        new = iter(op(*arguments))
        made, places = self._structures[arguments[1]]
        found = [next(new) if place is None else arguments[0][place] for place in places]
        return found, Constant(made)

    def _register_autograd(self) -> None:
        """Give the torch.library op its gradient."""
        compute = functools.partial(self._by_library, self.library_backward)

        def setup(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
            tensors, text, numbers, seeds = inputs
            made, _ = self._structures[text]
            self.save(ctx, Flat(tensors, seeds, decode(text, numbers)), output, made)
            ctx.mark_non_differentiable(*output[_count(made) or 1 :])
            ctx.lengths = len(tensors), len(numbers), len(seeds)

        def backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
            count, numbers, seeds = ctx.lengths
            leaves = self.facts_of(ctx.structure).leaves
            needs = [ctx.needs_input_grad[0][i] for i in leaves]
            outputs = _count(ctx.kept.made) or 1
            found = self.gradients(ctx, compute, grads[:outputs], needs)
            every: list[Tensor | None] = [None] * count
            for i, grad in zip(leaves, found, strict=True):
                every[i] = grad
            # torch.library treats an empty list of numbers as a list of tensors
            return every, None, None if numbers else [], None if seeds else []

        self.library.register_autograd(once_differentiable(backward), setup_context=setup)


class Backward(NamedTuple):
    """The arguments of a schedule's backward, as ``Schedule`` describes them."""

    kept: Any
    grads: Any
    needs: Any


register_tuples(Backward)


@dataclass(slots=True, eq=False)
class _Facts:
    """What is known of all calls of one structure.

    Attributes:
        leaves: Places of the tensors that may need a gradient, in the order of ``trained``.
        frozen: Places of the others.
        trained: ``trained(call)``, with slots.
        x: The place of the input.
    """

    leaves: tuple[int, ...]
    frozen: tuple[int, ...]
    trained: Any
    x: int


@dataclass(slots=True, eq=False)
class _Kept:
    """What is kept of a call for its backward.

    Attributes:
        structure: That of the result of ``keep``.
        places: Where the kept tensors are among those of the arguments and results.
        seeds: Where the kept seeds are among those of the arguments.
        x: Where the input is among the kept tensors, ``None`` if it is not kept.
        made: The structure of the results.
    """

    structure: Structure
    places: tuple[int, ...]
    seeds: tuple[int, ...]
    x: int | None
    made: Structure


def _function(schedule: Schedule) -> type[torch.autograd.Function]:
    """The autograd function of eager calls.

    Its arguments are the two functions that compute, the parts of the call, and once more those tensors among them that may need a
    gradient: torch looks for them only at the top level.
    """

    def forward(ctx: Any, computes: tuple[Compute, Compute], call: Flat, *leaves: Any) -> Any:
        results, made = computes[0](*call)
        schedule.save(ctx, call, results, made.value)
        ctx.compute = computes[1]
        return _outputs(results, made.value)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[2:]
        return None, None, *schedule.gradients(ctx, ctx.compute, grads, needs)

    methods = {
        "forward": staticmethod(forward),
        "backward": staticmethod(once_differentiable(backward)),
    }
    return type(schedule.name, (torch.autograd.Function,), methods)


def _count(made: Structure) -> int | None:
    """The number of results for the caller in the structure of ``(result, made)``; ``None`` for a tensor."""
    result = made.value[1]
    return None if result is ... else len(result) - 1


def _outputs(results: Sequence[Tensor], made: Structure) -> Any:
    count = _count(made)
    return results[0] if count is None else tuple(results[:count])


def _zeros(like: Any) -> tuple[list[Tensor], Constant]:
    found = flatten(like)
    # an empty gradient may be the incoming one, which must not be changed
    return [t.zero_() if t.numel() else t for t in found.tensors], Constant(found.structure)


def _replace(value: Any, by_slot: dict[int, bool]) -> Any:
    """``value`` with a truth value instead of each slot, and False instead of ``None``."""
    if value is None:
        return False
    if isinstance(value, Slot):
        return by_slot[value]
    parts = [_replace(part, by_slot) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def _pairs(trained: Any, grads: Any) -> list[Any]:
    """What ``grads`` has in the place of each slot of ``trained``, in order."""
    if trained is None:
        return []
    if isinstance(trained, Slot):
        return [grads]
    parts = [None] * len(trained) if grads is None else grads
    return [grad for two in zip(trained, parts, strict=True) for grad in _pairs(*two)]


def _own(t: Tensor, seen: set[int]) -> Tensor:
    """``t``, or a copy: of what shares memory with an argument or an earlier result, which torch.library forbids; and of what does
    not start where its storage starts, as the uninitialised results do.
    """
    storage = t.untyped_storage()._cdata
    if storage in seen or t.storage_offset():
        return t.clone()
    seen.add(storage)
    return t
