"""Operations are tried out, large ones with a few rows: results and memory are those of a run with all rows."""

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
        assert_few_tell_of_all(func, args, monkeypatch)


def assert_few_tell_of_all(func, args, monkeypatch):
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


def without_values(*shape, layout=torch.contiguous_format):
    t = torch.empty(shape).to(memory_format=layout) if len(shape) == 4 else torch.empty(shape)
    return make(of_layout(shape, t.stride(), torch.float32), False)


def others(layout):
    """Operations that are no convolutions, with arguments."""
    x, small = (without_values(ROWS, 16, side, side, layout=layout) for side in (14, 7))
    ones, numbers = torch.ones(16), without_values(ROWS, 4)
    strided = without_values(ROWS, 16, 32).transpose(1, 2)
    means = without_values(ROWS, 32, 1)
    sums = ROWS, 16, 196, 4
    return {
        aten.native_batch_norm.default: (x, ones, ones, ones, ones, True, 0.1, 1e-5),
        aten.native_batch_norm_backward.default: (
            *(x, x, ones, ones, ones, ones, ones, True, 1e-5),
            [True] * 3,
        ),
        aten.native_group_norm.default: (x, ones, ones, *sums, 1e-5),
        aten.native_group_norm_backward.default: (x, x, numbers, numbers, ones, *sums, [True] * 3),
        aten.upsample_bilinear2d.default: (small, [14, 14], False),
        aten.upsample_bilinear2d_backward.default: (x, [14, 14], [ROWS, 16, 7, 7], False),
        aten.avg_pool2d.default: (x, [2, 2]),
        aten._adaptive_avg_pool2d.default: (x, [1, 1]),
        aten.native_layer_norm.default: (strided, [16], ones, ones, 1e-5),
        aten.native_layer_norm_backward.default: (
            *(strided, strided, [16], means, means, ones, ones),
            [True] * 3,
        ),
        aten._log_softmax.default: (strided, 1, False),
    }


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_few_rows_tell_of_all_of_other_operations(layout, monkeypatch):
    for func, args in others(layout).items():
        assert_few_tell_of_all(func, args, monkeypatch)


def test_nothing_is_tried_out_elsewhere():
    (func, args), _ = arguments("3 x 3", torch.float32, torch.contiguous_format).items()
    on_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    assert try_out(func, on_meta, {}) is None
    assert try_out(aten.mm.default, args, {}) is None
    whole = without_values(2, 3, 4)
    assert try_out(aten._softmax.default, (whole, -1, False), {}) is None
    assert try_out(aten._softmax.default, (whole.transpose(1, 2), -1, False), {}) is not None
    with profile():
        assert try_out(func, args, {}) is None
    assert try_out(func, args, {}) is not None
