"""Count the bytes that a Triton kernel moves, and find accesses out of bounds and races.

Four methods of the interpreter get the addresses of the active lanes of every load, store and atomic of every program, so the
counts are exact::

    with Traffic() as traffic:
        kernel[grid](x, w, y, ...)
    launch = traffic.launches[-1].check()
    launch.arguments["x_ptr"].load.unique_bytes

There are three byte counts. *Requested* bytes are those that the programs access: the traffic between L2 and multiprocessors.
*Unique* bytes are those that DRAM must move if L2 serves every repeated read; they can be added over launches and compared with
``eager``. *Sector* bytes are whole 32-byte sectors of each tile access; divided by requested bytes they show how well an access
coalesces.

Kinds of findings: ``out of bounds`` (an active lane outside the tensor, or in the gaps of a strided view), ``race`` (two
programs touch one element and one of them stores plainly), ``duplicate`` (one store writes an address twice).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lab.patching import Builder, Executor, check_interpreter

SECTOR_BYTES = 32
_NOBODY, _SEVERAL = -1, -2


class Finding(NamedTuple):
    """A fault of one launch."""

    kind: str
    argument: str
    message: str


@dataclass
class Access:
    """All accesses of one kind (load, store, atomic) to one argument of a launch."""

    requested_bytes: int = 0
    unique_bytes: int = 0
    sector_bytes: int = 0
    lanes: int = 0
    active_lanes: int = 0


class Argument:
    """A tensor of a launch, and the programs that accessed each of its elements."""

    def __init__(self, name: str, tensor: Tensor):
        self.name, self.start, self.itemsize = name, tensor.data_ptr(), tensor.element_size()
        sizes = list(zip(tensor.stride(), tensor.shape, strict=True))
        self.span = 1 + sum((size - 1) * stride for stride, size in sizes)
        self.end = self.start + self.span * self.itemsize
        self._axes = sorted(((s, n) for s, n in sizes if n > 1 and s), reverse=True)
        self.load, self.store, self.atomic = Access(), Access(), Access()
        self._touched = {kind: np.zeros(self.span, bool) for kind in ("load", "store", "atomic")}
        self._reader, self._writer = (np.full(self.span, _NOBODY, np.int64) for _ in range(2))

    def holds(self, offsets: np.ndarray) -> np.ndarray:
        """Which element offsets are elements of the view and not in its gaps."""
        rest = offsets.copy()
        for stride, size in self._axes:
            rest -= np.minimum(rest // stride, size - 1) * stride
        return rest == 0

    def record(self, kind: str, addresses: np.ndarray, program: int) -> Iterator[tuple[str, str]]:
        """Count one tile access; yields the kind and description of each fault."""
        access: Access = getattr(self, kind)
        access.requested_bytes += addresses.size * self.itemsize
        access.active_lanes += addresses.size
        access.sector_bytes += np.unique(addresses // SECTOR_BYTES).size * SECTOR_BYTES
        elements = (addresses - self.start) // self.itemsize
        self._touched[kind][elements] = True
        if kind == "atomic":
            return
        writer, reader = self._writer[elements], self._reader[elements]
        others_wrote = ((writer != _NOBODY) & (writer != program)).any()
        if kind == "load":
            if others_wrote:
                yield "race", f"program {program} reads an element that another one stores"
            mine = (reader == _NOBODY) | (reader == program)
            self._reader[elements] = np.where(mine, program, _SEVERAL)
            return
        if np.unique(elements).size != elements.size:
            yield "duplicate", f"program {program} stores to one address twice in one tile"
        if others_wrote:
            yield "race", f"program {program} overwrites an element that another one stores"
        if ((reader != _NOBODY) & (reader != program)).any():
            yield "race", f"program {program} overwrites an element that another one reads"
        self._writer[elements] = program

    def finish(self) -> int:
        """Fill in the unique bytes; returns how many elements had both atomic and plain accesses."""
        for kind, touched in self._touched.items():
            getattr(self, kind).unique_bytes = int(touched.sum()) * self.itemsize
        plain = self._touched["store"] | self._touched["load"]
        return int((self._touched["atomic"] & plain).sum())


@dataclass
class Launch:
    """One kernel launch. ``dot_flops`` counts the FLOPs of the dots, including padding; ``values`` are the passed arguments."""

    kernel: str
    arguments: dict[str, Argument]
    values: dict[str, Any] = field(default_factory=dict, repr=False)
    grid: tuple[int, int, int] = (0, 0, 0)
    dot_flops: int = 0
    findings: list[Finding] = field(default_factory=list)

    def check(self) -> Launch:
        """Return the launch itself; raise ``AssertionError`` if anything was found."""
        faults = "; ".join(f"{f.kind} on {f.argument}: {f.message}" for f in self.findings)
        assert not faults, f"{self.kernel}: {faults}"
        return self

    def total(self, what: str = "unique_bytes") -> int:
        """Bytes of all arguments; an atomic counts twice, because it reads and writes."""
        return sum(
            getattr(a.load, what) + getattr(a.store, what) + 2 * getattr(a.atomic, what)
            for a in self.arguments.values()
        )

    def note(self, kind: str, argument: str, message: str) -> None:
        """Add a finding, unless the argument already has one of this kind."""
        if all((f.kind, f.argument) != (kind, argument) for f in self.findings):
            self.findings.append(Finding(kind, argument, message))


class Traffic(contextlib.AbstractContextManager):
    """Records every launch made inside the ``with`` block."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self._current: Launch | None = None

    @property
    def unique_bytes(self) -> int:
        """The bytes that all launches must move."""
        return sum(launch.total() for launch in self.launches)

    def check(self) -> Traffic:
        """Return the record itself; raise ``AssertionError`` if any launch had a fault, or if there was no launch."""
        assert self.launches, "no kernel was launched"
        for launch in self.launches:
            launch.check()
        return self

    def __enter__(self) -> Traffic:
        check_interpreter()
        self._replaced = {name: getattr(Builder, name) for name in _COUNTED}
        self._call = Executor.__call__
        for name, make in _COUNTED.items():
            setattr(Builder, name, make(self, self._replaced[name]))
        Executor.__call__ = self._launcher(self._call)
        return self

    def __exit__(self, *exception: object) -> None:
        for name, method in self._replaced.items():
            setattr(Builder, name, method)
        Executor.__call__ = self._call

    def _launcher(self, call: Any) -> Any:
        def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
            names = inspect.signature(executor.fn).parameters
            passed = {name: value for name, value in kwargs.items() if name in names}
            values = inspect.getcallargs(executor.fn, *args, **passed)
            arguments = {name: Argument(name, t) for name, t in _tensors(values).items()}
            current = Launch(executor.fn.__name__, arguments, values)
            self._current = current
            try:
                with (
                    _disable_current_modes()
                ):  # torch modes must not count the interpreter's own copies
                    return call(executor, *args, **kwargs)
            finally:
                for argument in current.arguments.values():
                    if mixed := argument.finish():
                        current.note(
                            "race",
                            argument.name,
                            f"{mixed} elements have atomic and plain accesses",
                        )
                self.launches.append(current)
                self._current = None

        return launch

    def _access(self, builder: Any, kind: str, pointers: Any, mask: Any) -> None:
        launch = self._current
        if launch is None:
            return
        addresses = np.asarray(pointers.data, np.uint64).astype(np.int64)
        active = np.broadcast_to(True if mask is None else mask.data, addresses.shape)
        lanes, rest = addresses.size, addresses[active]
        x, y, z = builder.grid_idx
        program = (x * launch.grid[1] + y) * launch.grid[2] + z
        gaps_of = None
        # views may interleave; an address counts for the view of which it is an element
        for argument in launch.arguments.values():
            inside = (rest >= argument.start) & (rest < argument.end)
            if not inside.any():
                continue
            gaps_of = argument
            inside[inside] = argument.holds((rest[inside] - argument.start) // argument.itemsize)
            if inside.any():
                getattr(argument, kind).lanes += lanes
                for fault, message in argument.record(kind, rest[inside], program):
                    launch.note(fault, argument.name, message)
                rest = rest[~inside]
        if rest.size:
            self._out_of_bounds(launch, kind, rest, gaps_of, (x, y, z))

    @staticmethod
    def _out_of_bounds(
        launch: Launch, kind: str, addresses: np.ndarray, gaps_of: Argument | None, program: tuple
    ) -> None:
        first = int(addresses[0])
        if gaps_of is not None and gaps_of.start <= first < gaps_of.end:
            message = (
                f"{kind} of {addresses.size} lanes in the gaps of a strided view, program {program}"
            )
            launch.note("out of bounds", gaps_of.name, message)
            return
        near = min(
            launch.arguments.values(),
            key=lambda a: min(abs(first - a.start), abs(first - a.end)),
        )
        message = (
            f"{kind} of {addresses.size} lanes outside every tensor, program {program}; "
            f"{near.name} is nearest, the first is {first - near.start:+d} bytes from its start"
        )
        launch.note("out of bounds", near.name, message)
        raise IndexError(message)  # the access itself would read or write memory of something else


def _tensors(call: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a call by name, including those inside tuples and tensor descriptors."""
    found: dict[str, Tensor] = {}
    stack = list(call.items())
    while stack:
        name, value = stack.pop()
        if isinstance(value, (tuple, list)):
            stack += [(f"{name}[{i}]", item) for i, item in enumerate(value)]
            continue
        tensor = value if hasattr(value, "data_ptr") else getattr(value, "base", None)
        if tensor is not None and tensor.numel():
            found[name] = tensor
    return found


def _counted_load(traffic: Traffic, load: Any) -> Any:
    @functools.wraps(load)
    def create_masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *hints: Any) -> Any:
        traffic._access(self, "load", ptrs, mask)
        return load(self, ptrs, mask, other, *hints)

    return create_masked_load


def _counted_store(traffic: Traffic, store: Any) -> Any:
    @functools.wraps(store)
    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *hints: Any) -> Any:
        traffic._access(self, "store", ptrs, mask)
        return store(self, ptrs, value, mask, *hints)

    return create_masked_store


def _counted_rmw(traffic: Traffic, rmw: Any) -> Any:
    def create_atomic_rmw(
        self: Any, rmwOp: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any
    ) -> Any:
        traffic._access(self, "atomic", ptr, mask)
        return rmw(self, rmwOp, ptr, val, mask, sem, scope)

    return create_atomic_rmw


def _counted_cas(traffic: Traffic, cas: Any) -> Any:
    def create_atomic_cas(self: Any, ptr: Any, cmp: Any, val: Any, sem: Any, scope: Any) -> Any:
        traffic._access(self, "atomic", ptr, None)
        return cas(self, ptr, cmp, val, sem, scope)

    return create_atomic_cas


def _counted_dot(traffic: Traffic, dot: Any) -> Any:
    def create_dot(
        self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any
    ) -> Any:
        if traffic._current is not None:
            traffic._current.dot_flops += 2 * a.data.size * b.data.shape[-1]
        return dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    return create_dot


def _counted_grid(traffic: Traffic, grid_dim: Any) -> Any:
    def set_grid_dim(self: Any, nx: int, ny: int, nz: int) -> Any:
        if traffic._current is not None:
            traffic._current.grid = (nx, ny, nz)
        return grid_dim(self, nx, ny, nz)

    return set_grid_dim


_COUNTED = {
    "create_masked_load": _counted_load,
    "create_masked_store": _counted_store,
    "create_atomic_rmw": _counted_rmw,
    "create_atomic_cas": _counted_cas,
    "create_dot": _counted_dot,
    "set_grid_dim": _counted_grid,
}
