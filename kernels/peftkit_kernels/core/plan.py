"""Launch plans: a schedule runs once for each signature of its arguments; later calls replay what it did.

A schedule is ordinary Python: it chooses configurations, allocates, calls torch operations and launches kernels. On a GPU this
can take longer than the kernels themselves. So the first call with a signature runs the schedule under a recorder
(``core.recorder``), which writes down every torch operation and every launch as a line of Python. These lines are the plan, a
function of the same arguments: it allocates, passes pointers to compiled kernels, and decides nothing. ``Plans.sources`` has its text.

A signature is everything that a schedule may decide by: class, shape, strides, dtype, device and alignment of each tensor, and the
value of each argument that is not a tensor, except seeds. The schedule must not look at the values of its tensors.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkit_kernels.core.recorder import Recorder, Seed, Unplannable, recording, storage

MAX_PLANS = 256
"""Plans that are kept for each op. Batches of ever new lengths would otherwise fill memory."""


def clear() -> None:
    """Drop all plans of all ops. Needed after a function that schedules call was replaced, as tests do."""
    for plans in list(_every):
        plans.clear()


class Kind(NamedTuple):
    """What an argument of a schedule is.

    Attributes:
        role: ``"tensor"``, ``"value"`` or ``"seed"``.
        is_list: Whether it is a list of these.
    """

    role: str
    is_list: bool


class Plans:
    """The plans of one schedule.

    Args:
        schedule: The function. It does not change its arguments.
        kinds: The kind of each of its arguments.
        otherwise: Computes the same if a tensor is a subclass, which may need its own code: kernels read plain memory.
        buffers: The tensors, of the same arguments, of which the schedule asks whether they are parts of one buffer.
    """

    def __init__(
        self,
        schedule: Callable[..., Any],
        kinds: Sequence[Kind],
        *,
        otherwise: Callable[..., Any] | None = None,
        buffers: Callable[..., Sequence[Tensor]] | None = None,
    ):
        self._otherwise = otherwise or schedule
        self._schedule, self._kinds, self._buffers = schedule, kinds, buffers
        self._plans: dict[tuple, Callable[..., Any]] = {}
        self.sources: dict[tuple, str] = {}
        """The source code of each plan, for people."""
        self._signature = _signature_function(kinds)
        _every.add(self)

    def clear(self) -> None:
        """Drop all plans."""
        self._plans.clear()
        self.sources.clear()

    def __call__(self, *args: Any) -> Any:
        """``schedule(*args)``."""
        signature = self._signature_of(args)
        plan = self._plans.get(signature)
        if plan is not None:
            return plan(*args)
        return self._record(signature, args)

    def find(self, args: Sequence[Any]) -> Callable[..., Any] | None:
        """The plan for ``schedule(*args)`` if there is one."""
        return self._plans.get(self._signature_of(args))

    def _signature_of(self, args: Sequence[Any]) -> tuple:
        signature = self._signature(*args)
        if self._buffers is None:
            return signature
        tensors = self._buffers(*args)
        return (*signature, _pattern(tensors)) if len(tensors) > 1 else signature

    def _record(self, signature: tuple, args: Sequence[Any]) -> Any:
        inputs: dict[str, Tensor] = {}
        marked: list[Any] = []
        for i, (kind, argument) in enumerate(zip(self._kinds, args, strict=True)):
            names = [f"a{i}_{j}" for j in range(len(argument))] if kind.is_list else [f"a{i}"]
            parts = list(argument) if kind.is_list else [argument]
            if kind.role == "tensor":
                inputs |= {n: t for n, t in zip(names, parts, strict=True) if t is not None}
            elif kind.role == "seed":
                parts = [Seed(name, seed) for name, seed in zip(names, parts, strict=True)]
            marked.append(parts if kind.is_list else parts[0])
        tensors = list(inputs.values())
        if any(type(t) not in _PLAIN for t in tensors):
            return self._otherwise(*args)
        watched = set(map(id, self._buffers(*args))) if self._buffers is not None else ()
        if any(not t.numel() for t in tensors) or _overlap(
            [t for t in tensors if id(t) not in watched]
        ):
            return self._schedule(*args)
        try:
            with recording(inputs) as found:
                result = self._schedule(*marked)
            source = self._source(args, tensors[0].device, found, result)
        except Unplannable as error:
            warnings.warn(f"{error}, so this operation runs its Python in every call", stacklevel=2)
            self._store(signature, self._schedule)
            return self._schedule(*args)
        self.sources[signature], scope = source, found.constants
        exec(source, scope)
        self._store(signature, scope["plan"])
        return result

    def _store(self, signature: tuple, plan: Callable[..., Any]) -> None:
        if len(self._plans) >= MAX_PLANS:
            oldest = next(iter(self._plans))
            self._plans.pop(oldest, None)
            self.sources.pop(oldest, None)
        self._plans[signature] = plan

    def _source(
        self, args: Sequence[Any], device: torch.device, found: Recorder, result: Any
    ) -> str:
        """The source code of a plan."""
        names = ", ".join(f"a{i}" for i in range(len(args)))
        lines = []
        if device.type == "cuda":
            found.constants |= {
                "cuda_device": torch.cuda.device,
                "current_device": torch._C._cuda_getDevice,
                "current_stream": torch._C._cuda_getCurrentRawStream,
            }
            lines += [
                f"if current_device() != {device.index}:",
                f"    with cuda_device({device.index}): return plan({names})",
                f"stream = current_stream({device.index})",
            ]
        else:
            lines.append("stream = 0")
        for i, (kind, argument) in enumerate(zip(self._kinds, args, strict=True)):
            if kind.is_list and kind.role != "value" and len(argument):
                lines.append("".join(f"a{i}_{j}, " for j in range(len(argument))) + f"= a{i}")
        lines += found.finish(result)
        return "\n    ".join([f"def plan({names}):", *lines])


_PLAIN = (Tensor, torch.nn.Parameter)
_every: weakref.WeakSet[Plans] = weakref.WeakSet()


def _signature_function(kinds: Sequence[Kind]) -> Callable[..., tuple]:
    """A function of the arguments of a schedule that returns their signature."""
    facts = "({0}.__class__, {0}.shape, {0}.stride(), {0}.dtype, {0}.device, {0}.data_ptr() & 15)"
    parts = ["precision()"]
    for i, kind in enumerate(kinds):
        if kind.role == "tensor":
            text = f"None if {{0}} is None else {facts}"
            one = text.format("t" if kind.is_list else f"a{i}")
            parts.append(f"tuple([{one} for t in a{i}])" if kind.is_list else one)
        elif kind.role == "value":
            parts.append(f"tuple(a{i})" if kind.is_list else f"a{i}")
        elif kind.is_list:
            # a schedule may treat adapters with equal seeds alike
            parts.append(f"tuple([a{i}.index(s) for s in a{i}])")
    names = ", ".join(f"a{i}" for i in range(len(kinds)))
    return eval(
        f"lambda {names}: ({', '.join(parts)},)",
        {"precision": torch.get_float32_matmul_precision},
    )


def _pattern(tensors: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """For each tensor the first one in the same storage, and its place in that if it is shared; empty if no storage is."""
    storages = [storage(t) for t in tensors]
    if len(set(storages)) == len(storages):
        return ()
    return tuple(
        (storages.index(storage), int(t.storage_offset()) if storages.count(storage) > 1 else 0)
        for storage, t in zip(storages, tensors, strict=True)
    )


def _overlap(tensors: Sequence[Tensor]) -> bool:
    """Whether two of the tensors may share memory. What a plan would note of one could then be taken for the other."""
    ranges: dict[int, list[tuple[int, int]]] = {}
    for t in tensors:
        extent = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        start = t.data_ptr()
        own = start, start + (extent + 1) * t.element_size()
        others = ranges.setdefault(storage(t), [])
        if any(own[0] < end and first < own[1] for first, end in others):
            return True
        others.append(own)
    return False
