"""Convolutions are tried out, large ones with a few rows: results and memory are those of a run with all rows."""

import pytest
import torch
from torch.profiler import profile

from peftkit.planning import trials
from peftkit.planning.tensors import has_no_values, make, of_layout
from peftkit.planning.trials import _batched, _run, try_out

aten = torch.ops.aten
ROWS = 12
SHAPES = {
    "patches": (3, 32, 4, 4, 1, 32),
    "depthwise": (32, 32, 7, 1, 32, 14),
    "3 x 3": (16, 32, 3, 1, 1, 14),
    "1 x 1": (16, 64, 1, 1, 1, 14),
}
"""Channels of input and output, size and stride of the kernel, groups, and pixels of a side."""


def arguments(shape, dtype, layout):
    """Arguments of both convolutions, on tensors without memory."""
    inputs, outputs, size, stride, groups, side = SHAPES[shape]
    padding = size // 2 if stride == 1 else 0
    x = torch.empty(ROWS, inputs, side, side).to(memory_format=layout)
    weight = torch.empty(outputs, inputs // groups, size, size)
    y = torch.conv2d(x, weight, stride=stride, padding=padding, groups=groups)
    x, weight, dy = (
        make(of_layout(tuple(t.shape), t.stride(), dtype), False) for t in (x, weight, y)
    )
    where = [stride, stride], [padding, padding], [1, 1], False, [0, 0], groups
    return {
        aten.convolution.default: (x, weight, None, *where),
        aten.convolution_backward.default: (dy, x, weight, [outputs], *where, [True] * 3),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_few_rows_tell_of_all(shape, layout, dtype, monkeypatch):
    for func, args in arguments(shape, dtype, layout).items():
        assert has_no_values(args[0])
        whole = _run(func, args, _batched(func, args), ROWS)
        assert try_out(func, args, {}) == whole
        with monkeypatch.context() as patch:
            patch.setattr(trials, "_known", {})
            patch.setattr(trials, "_MOST_BYTES", 0)
            patch.setattr(trials, "_LEAST_ROWS", 8)
            few = try_out(func, args, {})
        assert few is not None
        assert few.results == whole.results
        kept = sum(t.storage_bytes for t in whole.results if t is not None)
        # oneDNN may divide the work of few rows in another way
        assert abs(few.temporary - whole.temporary) <= 0.25 * (kept + whole.temporary)


def test_nothing_is_tried_out_elsewhere():
    (func, args), _ = arguments("3 x 3", torch.float32, torch.contiguous_format).items()
    on_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    assert try_out(func, on_meta, {}) is None
    assert try_out(aten.mm.default, args, {}) is None
    with profile():
        assert try_out(func, args, {}) is None
    assert try_out(func, args, {}) is not None
