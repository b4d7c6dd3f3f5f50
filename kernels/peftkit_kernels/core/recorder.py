"""What a schedule does, written down as lines of Python: every torch operation and every launch of a kernel.

Every tensor is a value with a name, or a view of one. Values of which only kernels see the address share one allocation.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ALLOCATIONS = frozenset(
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)

_current: ContextVar[Recorder | None] = ContextVar("peftkit_plan_recorder", default=None)


class Unplannable(Exception):
    """A schedule did something that cannot be replayed, such as reading the value of a tensor."""


class Seed:
    """The seed of a dropout mask while a schedule is recorded: each replay has its own.

    It has no arithmetic, so a schedule that computes with it fails instead of repeating one mask in every call.
    """

    __slots__ = ("name", "value")

    def __init__(self, name: str, value: int):
        self.name, self.value = name, value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seed) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


def number(value: Any) -> Any:
    """The value of a kernel's argument, which may be a ``Seed``."""
    return value.value if type(value) is Seed else value


class Constant:
    """A part of a schedule's result that is not a tensor. It is the same in every call with equal signature."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value


def current() -> Recorder | None:
    """The recorder of the schedule that is running, or ``None``."""
    return _current.get()


@contextlib.contextmanager
def recording(inputs: dict[str, Tensor]) -> Iterator[Recorder]:
    """Record the schedule that runs inside. ``inputs`` are its tensors by the name that the plan gives them."""
    found = Recorder(inputs)
    token = _current.set(found)
    try:
        with found:
            yield found
    finally:
        _current.reset(token)


class _Line(NamedTuple):
    """A line of a plan.

    Attributes:
        text: The source code. An address in the memory of a value is written as ``_address``.
        reads: The names of the values that it reads.
        makes: The name of the value whose memory it allocates, if it does only that.
    """

    text: str
    reads: tuple[str, ...]
    makes: str | None = None


class _Value(NamedTuple):
    """A tensor of a plan that has a name."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    start: int
    """Bytes from the start of its storage."""
    device: torch.device


class Recorder(TorchDispatchMode):
    """Writes down what a schedule does. Every tensor is a value with a name, or a view of one."""

    def __init__(self, inputs: dict[str, Tensor]):
        super().__init__()
        self.constants: dict[str, Any] = {"empty": torch.empty_strided}
        """The objects that the lines name, besides the values."""
        self._lines: list[_Line] = []
        self._names: dict[tuple, str] = {}
        """The name of the value that is a certain piece of a storage."""
        self._bases: dict[tuple, str] = {}
        """The name of the value that a piece of a storage is a view of."""
        self._values: dict[str, _Value] = {}
        self._made: dict[int, str] = {}
        """The value that owns each storage which the schedule makes."""
        self._as_tensors: set[str] = set()
        """The values that some line needs as a tensor, not only their address."""
        # while a weak reference exists, no other storage can have the same address
        self._storages: dict[int, StorageWeakRef] = {}
        self._inputs = frozenset(inputs)
        self._is_paused = False
        for name, t in inputs.items():
            self._add(t, name)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._is_paused:
            self._note(func, args, kwargs, result)
        return result

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Do not write down torch operations: the interpreter copies what a kernel reads."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def call(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """``function(*arguments)``, a tensor that each replay asks for anew. The arguments contain no tensors."""
        with self.pause():
            result = function(*arguments)
        words = ", ".join(self._constant(a) for a in arguments)
        called = self._constant(function)
        self._lines.append(_Line(f"{self._add(result)} = {called}({words})", ()))
        return result

    def launched(
        self,
        kernel: Any,
        compiled: Any,
        grid: tuple[int, ...],
        arguments: Sequence[Any],
        constants: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        """Note a launch of ``kernel``; ``compiled`` is what Triton returned for it, ``None`` in the interpreter."""
        reads = [self._base(a) for a in arguments if isinstance(a, Tensor)]
        if compiled is None:
            words = [self._word(a) for a in arguments]
            reads = [self._name(a) for a in arguments if isinstance(a, Tensor)]
            named = self._constant(constants | options)
            text = f"{self._constant(kernel)}[{grid!r}]({', '.join(words)}, **{named})"
        else:
            passed = iter([self._pointer(a) for a in arguments])
            words = [
                self._constant(constants[name]) if name in constants else next(passed)
                for name in kernel.arg_names
            ]
            shape = ", ".join(map(str, (*grid, 1, 1)[:3]))
            handle = ", ".join(
                self._constant(part) for part in (compiled.function, compiled.packed_metadata)
            )
            # no launch metadata and no hooks
            text = (
                f"{self._constant(compiled.run)}({shape}, stream, {handle}, None, None, None, "
                f"{', '.join(words)})"
            )
        self._lines.append(_Line(text, tuple(reads)))

    def finish(self, result: Any) -> list[str]:
        """The lines of the plan, the last of which returns what the schedule has returned."""
        returned = f"return {self._result(result)}"
        kept = {self._names[_key(t)] for t in tree_leaves(result) if isinstance(t, Tensor)}
        kept |= self._inputs
        last = {name: at for at, line in enumerate(self._lines) for name in line.reads}
        arena = self._arena(kept, last)
        lines = []
        for at, line in enumerate(self._lines):
            if at == arena.first:
                lines += self._allocate_arena(arena.size)
            if line.makes not in arena.offsets:
                lines.append(_addressed(line.text, arena.offsets))
            dead = [name for name in dict.fromkeys(line.reads) if last[name] == at]
            dead = [name for name in dead if name not in kept and name not in arena.offsets]
            if at == arena.last:
                dead.append("arena")
            if dead:
                lines.append(f"del {', '.join(dead)}")
        return [*lines, returned]

    def _arena(self, kept: set[str], last: dict[str, int]) -> _Arena:
        """One allocation for all values of which only kernels see the address. Each lies where none is that lives at the same time."""
        lives = {
            line.makes: (at, last.get(line.makes, at))
            for at, line in enumerate(self._lines)
            if line.makes and line.makes not in kept and line.makes not in self._as_tensors
        }
        if len(lives) < 2 or len({self._values[name].device for name in lives}) > 1:
            return _Arena({}, 0, -1, -1)
        offsets: dict[str, int] = {}
        size = 0
        for name, (start, end) in lives.items():
            taken = sorted(
                (offsets[other], offsets[other] + _bytes(self._values[other]))
                for other in offsets
                if lives[other][1] >= start and lives[other][0] <= end
            )
            at = 0
            for begin, stop in taken:
                if at + _bytes(self._values[name]) <= begin:
                    break
                at = max(at, stop)
            offsets[name] = at
            size = max(size, at + _bytes(self._values[name]))
        return _Arena(
            offsets,
            size,
            min(start for start, _ in lives.values()),
            max(end for _, end in lives.values()),
        )

    def _allocate_arena(self, size: int) -> list[str]:
        device = next(iter(self._values.values())).device
        words = (
            f"({size},), (1,), dtype={self._constant(torch.uint8)}, device={self._constant(device)}"
        )
        return [f"arena = empty({words})", "start = arena.data_ptr()"]

    def _note(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        name, changes = func._schema.name, func._schema.is_mutable
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        sources = {storage(t): t for t in read}
        if read and not any(storage in self._storages for storage in sources):
            return  # of tensors that the plan does not know: the import of a module that makes a table, for instance
        if not outputs and not changes:
            if read:
                raise Unplannable(f"{func} reads the value of a tensor in a schedule")
        elif name == "aten::resize_":
            # of a tensor that the schedule has made: the same elements in another shape
            self._bases[_key(result)] = self._made[storage(result)]
        elif not changes and all(storage(t) in sources for t in outputs):
            for t in outputs:
                self._bases.setdefault(_key(t), self._base(sources[storage(t)]))
        elif name in _ALLOCATIONS:
            self._allocate(result)
        else:
            self._operation(func, args, kwargs, result)

    def _allocate(self, t: Tensor) -> None:
        out = self._make(t)
        dtype, device = self._constant(t.dtype), self._constant(t.device)
        text = f"{out} = empty({tuple(t.shape)}, {t.stride()}, dtype={dtype}, device={device})"
        self._lines.append(_Line(text, (), out))

    def _operation(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        words = [self._word(a) for a in args]
        words += [f"{name}={self._word(a)}" for name, a in kwargs.items()]
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        reads = tuple(self._name(t) for t in read)
        text = f"{self._constant(_FUNCTIONS.get(func, func._op))}({', '.join(words)})"
        if not func._schema.is_mutable:
            found = [result] if isinstance(result, Tensor) else result
            outs = [self._make(t) if isinstance(t, Tensor) else "_" for t in found]
            text = f"{', '.join(outs)} = {text}"
        self._lines.append(_Line(text, reads))

    def _result(self, result: Any) -> str:
        if isinstance(result, (tuple, list)):
            parts = ", ".join(self._result(part) for part in result)
            return f"[{parts}]" if isinstance(result, list) else f"({parts},)"
        if result is None:
            return "None"
        if isinstance(result, Constant):
            return self._constant(result)
        key = _key(result)
        base = self._bases.get(key)
        if (
            key not in self._names
            and base is not None
            and base not in self._inputs
            and self._values[base].shape.numel() == result.numel()
            and result.is_contiguous()
        ):
            # not a view, which autograd would not let the caller change in place
            self._lines.append(_Line(f"{base}.resize_({tuple(result.shape)})", (base,)))
            self._names[key] = base
            self._as_tensors.add(base)
        return self._name(result)

    def _add(self, t: Tensor, name: str | None = None) -> str:
        name, key = name or f"v{len(self._values)}", _key(t)
        self._storages.setdefault(key[0], StorageWeakRef(t.untyped_storage()))
        self._names[key] = self._bases[key] = name
        self._values[name] = _value(t)
        return name

    def _make(self, t: Tensor) -> str:
        out = self._add(t)
        self._made[storage(t)] = out
        return out

    def _base(self, t: Tensor) -> str:
        try:
            return self._bases[_key(t)]
        except KeyError:
            raise Unplannable(
                f"a tensor {tuple(t.shape)} is neither an argument of a schedule nor made by it"
            ) from None

    def _name(self, t: Tensor) -> str:
        """The name of the value ``t``. If it is a view without one, this adds the line that makes it."""
        key = _key(t)
        self._as_tensors.add(self._base(t))
        if key not in self._names:
            base = self._base(t)
            name = self._names[key] = f"v{len(self._values)}"
            self._values[name] = _value(t)
            self._lines.append(_Line(f"{name} = {self._view(t, base)}", (base,)))
        return self._names[key]

    def _view(self, t: Tensor, name: str) -> str:
        """The expression for ``t``, a view of the value ``name``."""
        base, shape, stride = self._values[name], tuple(t.shape), t.stride()
        if base.dtype is t.dtype and not self._distance(t):
            if stride == base.stride[::-1] and shape == base.shape[::-1] and len(shape) == 2:
                return f"{name}.t()"
            is_whole = t.numel() == base.shape.numel() and t.is_contiguous()
            if is_whole and base.stride == _contiguous(base.shape):
                return f"{name}.view({shape})"
        source = name if base.dtype is t.dtype else f"{name}.view({self._constant(t.dtype)})"
        # only an argument can lie elsewhere in its storage in another call
        where = str(t.storage_offset())
        if name in self._inputs:
            where = f"{source}.storage_offset() + {self._distance(t) // t.element_size()}"
        return f"{source}.as_strided({shape}, {stride}, {where})"

    def _distance(self, t: Tensor) -> int:
        """Bytes from the first element of the value that ``t`` is a view of."""
        return int(t.storage_offset()) * t.element_size() - self._values[self._base(t)].start

    def _pointer(self, argument: Any) -> str:
        if not isinstance(argument, Tensor):
            return self._word(argument)
        return _address(self._base(argument), self._distance(argument))

    def _word(self, argument: Any) -> str:
        """An argument of an operation, as it is written in a line."""
        if isinstance(argument, Tensor):
            return self._name(argument)
        if type(argument) is Seed:
            return argument.name
        if isinstance(argument, (list, tuple)) and any(isinstance(a, Tensor) for a in argument):
            return f"[{', '.join(self._word(a) for a in argument)}]"
        return self._constant(argument)

    def _constant(self, value: Any) -> str:
        if value is None or type(value) in (int, bool, str):
            return repr(value)
        for name, found in self.constants.items():
            if found is value:
                return name
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name


class _Arena(NamedTuple):
    """One allocation that serves for several values of a plan.

    Attributes:
        offsets: Where each of them lies, in bytes.
        size: Bytes in all.
        first: The line before which it is allocated.
        last: The line after which it is freed.
    """

    offsets: dict[str, int]
    size: int
    first: int
    last: int


_ALIGNMENT = 512
"""Bytes. Values in an arena start where torch's allocator on a GPU would let them start."""

_FUNCTIONS = {
    torch.ops.aten.addmm_.default: Tensor.addmm_,
    torch.ops.aten.addmm.default: torch.addmm,
    torch.ops.aten.addmm.out: torch.addmm,
    torch.ops.aten.mm.default: torch.mm,
    torch.ops.aten.mm.out: torch.mm,
    torch.ops.aten.cat.default: torch.cat,
}
"""Functions that are faster than ``torch.ops`` to call and do the same."""

_ADDRESS = re.compile(r"@(\w+)\+(\d+)@")


def _address(name: str, distance: int) -> str:
    """The address ``distance`` bytes into a value, as lines contain it until it is known where the value lies."""
    return f"@{name}+{distance}@"


def _addressed(text: str, offsets: dict[str, int]) -> str:
    """A line with its addresses; ``offsets`` are those of the values in the arena."""

    def replaced(found: re.Match[str]) -> str:
        name, distance = found[1], int(found[2])
        start = f"{name}.data_ptr()"
        if name in offsets:
            start, distance = "start", distance + offsets[name]
        return f"{start} + {distance}" if distance else start

    return _ADDRESS.sub(replaced, text)


def _value(t: Tensor) -> _Value:
    start = int(t.storage_offset()) * t.element_size()
    return _Value(t.shape, t.stride(), t.dtype, start, t.device)


def _bytes(value: _Value) -> int:
    """The memory of a value, in whole units of alignment."""
    extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride, strict=True))
    return -(-extent * value.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def storage(t: Tensor) -> int:
    """The identity of the storage of ``t``."""
    return t.untyped_storage()._cdata


def _key(t: Tensor) -> tuple:
    return storage(t), t.storage_offset(), t.shape, t.stride(), t.dtype
