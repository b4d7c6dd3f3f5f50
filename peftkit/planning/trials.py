"""Operations on the CPU that are tried out: the layouts of their results, and what they take besides them.

Some operations copy tensors into other layouts or have working memory, above all convolutions: oneDNN has layouts of its own. No
formula gives these: they depend on the processor and on each shape. So such an operation runs once on zeros, and torch's allocations
are recorded. Of a large batch it runs with a part of the rows, and with half of these: memory is nearly linear in the rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
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

_CONVOLUTIONS = {aten.convolution.default: 1, aten.convolution_backward.default: 2}
"""Convolutions, and how many of their first arguments have the rows of the batch."""

_OTHERS = frozenset(
    (
        *(aten.native_batch_norm.default, aten.native_batch_norm_backward.default),
        *(aten.native_group_norm.default, aten.native_group_norm_backward.default),
        *(aten.upsample_bilinear2d.default, aten.upsample_bilinear2d_backward.default),
        *(aten.upsample_bicubic2d.default, aten.upsample_bicubic2d_backward.default),
        *(aten.upsample_nearest2d.default, aten.upsample_nearest2d_backward.default),
        *(aten.max_pool2d_with_indices.default, aten.max_pool2d_with_indices_backward.default),
        *(aten.avg_pool2d.default, aten.avg_pool2d_backward.default),
        *(aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d_backward.default),
    )
)
"""Operations whose tensors with several axes all have the rows of the batch."""

_OF_STRIDED = frozenset(
    (
        *(aten.native_layer_norm.default, aten.native_layer_norm_backward.default),
        *(aten._softmax.default, aten._softmax_backward_data.default),
        *(aten._log_softmax.default, aten._log_softmax_backward_data.default),
    )
)
"""Such operations that take no further memory if their tensors are contiguous."""

_COUNTS = {aten.native_group_norm.default: 3, aten.native_group_norm_backward.default: 5}
"""Which argument is the number of rows."""

_LEAST_ROWS = 4
"""Rows with which an operation runs at least. With one row oneDNN divides the work among threads in another way."""
_MOST_BYTES = 2**26
"""With more rows it runs only if their tensors are not larger."""


class Trial(NamedTuple):
    """What a run of an operation showed.

    Attributes:
        results: The shapes and strides of its results, ``None`` for those that were not wanted.
        temporary: How far the memory during the run rises above that after it, in bytes.
    """

    results: list[Sizes | None]
    temporary: int


_known: dict[Any, Trial] = {}


def try_out(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Trial | None:
    """Run an operation on the CPU if it is one of those above, unless it is being profiled.

    Args:
        func: The operation.
        args: Its arguments. Their values are not read.
        kwargs: Others, with which it is not tried out: autograd passes none.
    """
    batched = _batched(func, args)
    if not batched or kwargs or args[0].is_meta or _profiler_enabled():
        return None
    key = func, described(args), torch.get_num_threads()
    if key not in _known:
        rows = args[0].shape[0]
        row_bytes = sum(args[i].nbytes for i in batched) // max(rows, 1)
        more = max(_LEAST_ROWS, _MOST_BYTES // max(row_bytes, 1))
        if rows <= more:
            _known[key] = _run(func, args, batched, rows)
        else:
            few = more // 2
            trials = (_run(func, args, batched, count) for count in (few, more))
            _known[key] = _extended(*trials, (rows - few) / (more - few), rows)
    return _known[key]


def _batched(func: Any, args: Sequence[Any]) -> list[int]:
    """Which arguments have the rows of the batch; none if the operation is not tried out."""
    if func in _CONVOLUTIONS:
        return list(range(_CONVOLUTIONS[func]))
    if func not in _OTHERS and func not in _OF_STRIDED:
        return []
    found = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dim() > 1]
    strided = func in _OTHERS or not all(args[i].is_contiguous() for i in found)
    return found if strided else []


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


def _run(func: Any, args: Sequence[Any], batched: Sequence[int], rows: int) -> Trial:
    """Run an operation on zeros."""
    all_rows = args[0].shape[0]
    real = [_zeros(a, rows if i in batched else None) for i, a in enumerate(args)]
    if func in _COUNTS:
        real[_COUNTS[func]] = rows
    if "upsample" in func.__name__:  # the backward has the sizes of the input as a list
        real = [
            [rows, *a[1:]] if isinstance(a, list) and len(a) == 4 and a[0] == all_rows else a
            for a in real
        ]
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
