"""Convolutions on the CPU: the layouts of their results, and what they take besides them.

oneDNN copies tensors into layouts of its own and has working memory, and torch lets it choose layouts of results. No formula gives
these: they depend on the processor and on each shape. So a convolution runs once on zeros, with a few rows of its batch, and
torch's allocations are recorded. They are linear in the rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._autograd import (
    _disable_profiler_legacy,
    _enable_profiler_legacy,
    _profiler_enabled,
)
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig

from peftkit.planning.tensors import Sizes, described, of_layout

aten = torch.ops.aten

_BATCHED = {aten.convolution.default: 1, aten.convolution_backward.default: 2}
"""Convolutions, and how many of their first arguments have the rows of the batch."""

_ROWS = 2, 4
"""Rows of the two runs. With one row oneDNN divides the work among threads in another way."""


class Trial(NamedTuple):
    """What a run of a convolution showed.

    Attributes:
        results: The shapes and strides of its results, ``None`` for those that were not wanted.
        temporary: How far the memory during the run rises above that after it, in bytes.
    """

    results: list[Sizes | None]
    temporary: int


_known: dict[Any, Trial] = {}


def try_out(func: Any, args: Sequence[Any]) -> Trial | None:
    """Run an operation if it is a convolution on the CPU, unless it is being profiled.

    Args:
        func: The operation.
        args: Its arguments. Their values are not read.
    """
    batched = _BATCHED.get(func)
    if batched is None or args[0].is_meta or _profiler_enabled():
        return None
    key = func, described(args), torch.get_num_threads()
    if key not in _known:
        rows, (few, more) = args[0].shape[0], _ROWS
        if rows <= more:
            _known[key] = _run(func, args, batched, rows)
        else:
            trials = (_run(func, args, batched, count) for count in _ROWS)
            _known[key] = _extended(*trials, (rows - few) / (more - few), rows)
    return _known[key]


def _extended(first: Trial, second: Trial, times: float, rows: int) -> Trial:
    """What a run with ``rows`` rows would show, from two with fewer; ``times`` the rows by which they differ are to be added."""
    results = [
        two
        if one == two or two is None
        else of_layout((rows, *two.shape[1:]), two.stride, two.dtype)
        for one, two in zip(first.results, second.results, strict=True)
    ]
    more = times * (second.temporary - first.temporary)
    return Trial(results, max(0, round(first.temporary + more)))


def _run(func: Any, args: Sequence[Any], batched: int, rows: int) -> Trial:
    """Run a convolution on zeros."""
    real = [_zeros(a, rows if i < batched else None) for i, a in enumerate(args)]
    config = ProfilerConfig(
        ProfilerState.CPU,
        report_input_shapes=False,
        profile_memory=True,
        with_stack=False,
        with_flops=False,
        with_modules=False,
        experimental_config=_ExperimentalConfig(),
    )
    _enable_profiler_legacy(config)
    try:
        found = func(*real)  # kept until the end of the recording
    finally:
        events = _disable_profiler_legacy()
    changes = [
        event.cpu_memory_usage()
        for thread in events
        for event in thread
        if event.kind() == "memory_alloc"
    ]
    used = list(itertools.accumulate(changes, initial=0))
    results = found if isinstance(found, tuple) else (found,)
    return Trial(
        [None if t is None else of_layout(tuple(t.shape), t.stride(), t.dtype) for t in results],
        max(used) - used[-1],
    )


def _zeros(value: Any, rows: int | None) -> Any:
    """A tensor of zeros with memory, like ``value`` but for its number of rows; other values as they are."""
    if not isinstance(value, Tensor):
        return value
    shape = value.shape if rows is None else (rows, *value.shape[1:])
    return torch.empty_strided(shape, value.stride(), dtype=value.dtype).zero_()
