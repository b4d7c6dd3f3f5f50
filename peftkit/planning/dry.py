"""Run torch code without computing: large tensors have sizes and addresses, but no memory.

``DryRun`` is a dispatch mode. Every tensor in it is a plain ``torch.Tensor``, so the code that runs decides as in a real run. An
operation on large tensors is evaluated on the meta device, which gives the shapes, strides and dtypes of its results. The results
get storages of the right sizes, at addresses that no data is behind. Views and results in place share the storage of their input.
So a storage lives exactly as long as in a real run.

Small tensors of whole numbers, such as token ids and masks, and single numbers are computed, so that decisions that depend on
them are those of a real run. ``rules.ASSUMED`` has the operations whose result decides something and cannot be computed. Convolutions
and others on the CPU are tried out (``trials``), because only a run tells how their results are laid out and what they take besides.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from peftkit.planning.rules import ASSUMED, MOST_INTEGERS, SIZES, tensors_in
from peftkit.planning.tensors import (
    Sizes,
    contiguous,
    described,
    has_no_values,
    make,
    sizes_of,
)
from peftkit.planning.trials import try_out
from peftkit_kernels import native
from peftkit_kernels.core import workspace

aten = torch.ops.aten

_MOST_FLOATS = 2**8
"""Elements of the largest tensor of floating-point numbers that is computed. Enough for tables of codes and counters of steps."""

_WRITTEN_OVER = (aten.add.Tensor, aten.scatter_add.default, aten.index_put.default)
_ENGINE = torch.autograd.graph._engine_run_backward.__code__
_META = torch.device("meta")


class DryRun(TorchDispatchMode):
    """A mode in which operations are not computed, except on small tensors.

    Args:
        watch: Called after each operation with its result, or with ``None`` if that is a view, and with ``times_run``.

    Attributes:
        times_run: How often a real run runs what runs now: loops over blocks are shortened (``peftkit_kernels.core.blocks``).
    """

    sees_native_calls = True

    def __init__(self, watch: Callable[[Any, int], None]):
        super().__init__()
        self.times_run = 1
        self._watch = watch
        self._known: dict[Any, Any] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch would wrap each call to switch its compiler off

    def __enter__(self) -> DryRun:
        """Start; native code does nothing inside, and peftkit's buffers are others."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(native.skipped())
            stack.enter_context(workspace.isolated())
            super().__enter__()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        """End."""
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The result of one operation."""
        kwargs = kwargs or {}
        out = self._result(func, args, kwargs)
        # a view is of known memory, or of a tensor from outside; lift_fresh gives constants to a mode
        is_new = func is aten.lift_fresh.default or not func.is_view
        self._watch(out if is_new else None, self.times_run)
        trial = try_out(func, args, kwargs)
        if trial is not None:
            self.watch_temporary(trial.temporary)
        return out

    def watch_temporary(self, size: int) -> None:
        """Memory that is in use for a moment only, in bytes."""
        self._watch(make(contiguous((size,), torch.uint8), False), self.times_run)

    def _result(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if _uses_no_values(func):
            return func(*args, **kwargs)
        if func in _WRITTEN_OVER and _is_written_over(args[0], sys._getframe(2)):
            return args[0]
        tensors = list(tensors_in((args, kwargs)))
        computed = not any(map(has_no_values, tensors))
        if not computed and func in ASSUMED:
            return ASSUMED[func](self, func, *args, **kwargs)
        if computed and all(map(_is_small, tensors)):
            if func._schema.is_mutable or func in ASSUMED:
                return func(*args, **kwargs)
            sizes = [s for s in tree_leaves(self.sizes(func, args, kwargs)) if s is not None]
            if all(isinstance(s, Sizes) and _is_small(s) for s in sizes):
                return _compute(func, args, kwargs)
        if func._schema.is_mutable:
            return self._in_place(func, args, kwargs)
        return self.without_values(func, args, kwargs)

    def without_values(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an operation in the right sizes."""
        wanted = kwargs.get("device")
        on_meta = any(t.is_meta for t in tensors_in((args, kwargs)))
        on_meta = on_meta if wanted is None else torch.device(wanted).type == "meta"
        found = self.sizes(func, args, kwargs)
        return tree_map(lambda s: make(s, on_meta) if isinstance(s, Sizes) else s, found)

    def sizes(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an operation, with ``Sizes`` instead of tensors."""
        if _takes_device(func) and (
            kwargs.get("device") or not any(True for _ in tensors_in(args))
        ):
            kwargs = {**kwargs, "device": _META}
            kwargs.pop("pin_memory", None)
        rule = SIZES.get(str(func))
        if rule is not None:
            return rule(*args, **kwargs)
        trial = try_out(func, args, kwargs)
        if trial is not None:
            return trial.results[0] if len(trial.results) == 1 else tuple(trial.results)
        key = func, described((args, kwargs))
        if key not in self._known:
            args, kwargs = tree_map(_as_meta, (args, kwargs))
            self._known[key] = tree_map(sizes_of, func(*args, **kwargs))
        return self._known[key]

    def _in_place(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an operation that writes to some of its arguments and returns them; nothing is written."""
        schema = func._schema
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        written = {}
        for argument in schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                written[tuple(argument.alias_info.before_set)] = given.get(argument.name)
        found = [
            r.alias_info and written.get(tuple(r.alias_info.before_set)) for r in schema.returns
        ]
        if any(value is None for value in found):
            fresh = self.without_values(func, args, kwargs)
            fresh = fresh if isinstance(fresh, (tuple, list)) else (fresh,)
            found = [f if value is None else value for value, f in zip(found, fresh, strict=True)]
        return tuple(found) if len(found) > 1 else found[0] if found else None


def _is_written_over(t: Tensor, caller: FrameType) -> bool:
    """Whether autograd would write a sum of gradients over ``t`` in a real run.

    It adds in place if nothing else uses the tensor, except inside a dispatch mode (``isTensorSubclassLike`` in torch). Two
    references to the storage and four to the tensor are those of this call.
    """
    return (
        caller.f_code is _ENGINE
        and not torch.is_grad_enabled()
        and torch._C._storage_Use_Count(t.untyped_storage()._cdata) == 2
        and t._use_count() == 4  # pyright: ignore[reportAttributeAccessIssue]
        and t.numel() == 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    )


@functools.cache
def _uses_no_values(func: Any) -> bool:
    # torch declares _unsafe_view as a new tensor, but it has the memory of its input
    is_view = func.is_view or func is aten._unsafe_view.default
    changes_sizes = torch.Tag.inplace_view in func.tags  # of its argument, as t_ and resize_ do
    return is_view or changes_sizes or func.namespace == "profiler"


@functools.cache
def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def _is_small(t: Tensor | Sizes) -> bool:
    is_real = t.dtype.is_floating_point or t.dtype.is_complex
    return math.prod(t.shape) <= (_MOST_FLOATS if is_real else MOST_INTEGERS)


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    out = func(*args, **kwargs)
    if "empty" in func.__name__ and isinstance(out, Tensor):
        out.zero_()  # no decision may depend on what was in memory
    if func is aten.rand.default and out.numel() == 1:
        out.fill_(1 - 2**-24)  # nor on chance: no layer is dropped
    return out


def _as_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)
