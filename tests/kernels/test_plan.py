"""Launch plans: a replay does what the schedule does, for other values, and nothing that a signature leaves open is fixed."""

import contextlib
import ctypes
import random
import threading

import pytest
import torch

from peftkit_kernels.core import plan, recorder
from peftkit_kernels.core.plan import Kind, Plans
from peftkit_kernels.core.recorder import Seed

TENSOR, TENSORS = Kind("tensor", False), Kind("tensor", True)
VALUE, SEED, SEEDS = Kind("value", False), Kind("seed", False), Kind("seed", True)


def _schedule(x, weights, bias, scale):
    """Allocations, views, changes in place, an operation with two results, and one with a list."""
    flat = x.reshape(-1, x.shape[-1])
    out = flat.new_empty(flat.shape[0], 2 * weights[0].shape[0])
    for part, weight in zip(out.chunk(2, 1), weights, strict=True):
        torch.mm(flat, weight.t(), out=part)
    if bias is not None:
        out += torch.cat([bias, bias])
    values, indices = out[1:].max(0)
    y = (flat @ weights[0].t()).mul_(scale)
    y.resize_(*x.shape[:-1], y.shape[-1])
    return y, [values, indices], out[:, 1:]


def _plans(schedule=_schedule, kinds=(TENSOR, TENSORS, TENSOR, VALUE), **options):
    return Plans(schedule, kinds, **options)


def _arguments(seed, rows=3, bias=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, rows, 5, generator=generator)
    weights = [torch.randn(4, 5, generator=generator) for _ in range(2)]
    return x, weights, torch.randn(4, generator=generator) if bias else None, 0.5


def _assert_same(actual, expected):
    y, (values, indices), part = actual
    wanted_y, (wanted_values, wanted_indices), wanted_part = expected
    assert torch.equal(y, wanted_y)
    assert torch.equal(values, wanted_values)
    assert torch.equal(indices, wanted_indices)
    assert torch.equal(part, wanted_part)
    assert (part.stride(), y.shape) == (wanted_part.stride(), wanted_y.shape)


@pytest.mark.parametrize("bias", [True, False])
def test_a_replay_equals_the_schedule(bias):
    plans = _plans()
    for seed in range(3):
        arguments = _arguments(seed, bias=bias)
        _assert_same(plans(*arguments), _schedule(*arguments))
    assert len(plans.sources) == 1


def test_results_are_new_and_may_be_changed_in_place():
    plans = _plans()
    arguments = _arguments(0)
    plans(*arguments)
    first = plans(*arguments)
    second = plans(*arguments)
    first[0].zero_()
    _assert_same(second, _schedule(*arguments))
    assert not first[0]._is_view()


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, b, s: (x[:, :2], w, b, s),
        lambda x, w, b, s: (x.transpose(0, 1).contiguous().transpose(0, 1), w, b, s),
        lambda x, w, b, s: (x.double(), [t.double() for t in w], b.double(), s),
        lambda x, w, b, s: (torch.cat([x.flatten(), x.new_zeros(1)])[1:].view(x.shape), w, b, s),
        lambda x, w, b, s: (x, w, None, s),
        lambda x, w, b, s: (x, w, b, 0.25),
    ],
    ids=["shape", "strides", "dtype", "alignment", "absent", "value"],
)
def test_what_a_schedule_may_decide_by_is_in_the_signature(change):
    plans = _plans()
    arguments = _arguments(0)
    plans(*arguments)
    for _ in range(2):
        changed = change(*arguments)
        _assert_same(plans(*changed), _schedule(*changed))
    assert len(plans.sources) == 2


def test_a_view_with_another_offset_needs_no_plan_of_its_own():
    memory = torch.randn(200)
    plans = _plans(lambda x: x[1:] * 2, [TENSOR])
    for start in (0, 16, 64):
        x = memory[start : start + 16].view(4, 4)
        assert torch.equal(plans(x), x[1:] * 2)
    assert len(plans.sources) == 1


def test_a_view_of_another_dtype():
    plans = _plans(lambda x: x.view(torch.int32)[2:].clone(), [TENSOR])
    for start in (0, 16):
        x = torch.arange(64, dtype=torch.uint8)[start : start + 16]
        assert torch.equal(plans(x), x.view(torch.int32)[2:])


def test_precision_of_products_is_in_the_signature():
    plans = _plans(lambda x: x @ x, [TENSOR])
    x = torch.eye(4)
    plans(x)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        plans(x)
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(plans.sources) == 2


def test_a_schedule_that_computes_with_a_seed_fails():
    plans = _plans(lambda x, seed: x + (seed & 7), [TENSOR, SEED])
    with pytest.raises(TypeError, match="Seed"):
        plans(torch.ones(2), 5)


def test_which_seeds_are_equal_is_in_the_signature():
    def schedule(x, seeds):
        return x * len(set(seeds))

    plans = _plans(schedule, [TENSOR, SEEDS])
    x = torch.ones(2)
    for seeds in ([3, 3], [1, 2], [8, 8], [5, 6]):
        assert torch.equal(plans(x, seeds), x * len(set(seeds)))
    assert len(plans.sources) == 2


def test_equal_seeds_are_equal():
    assert Seed("a", 3) == Seed("b", 3)
    assert Seed("a", 3) != Seed("a", 4)
    assert len({Seed("a", 3), Seed("b", 3)}) == 1
    assert recorder.number(Seed("a", 3)) == 3


@pytest.mark.parametrize(
    "schedule", [lambda x: x * x.sum().item(), lambda x: x if x.any() else -x], ids=["item", "if"]
)
def test_a_schedule_that_reads_a_value_is_not_planned(schedule):
    plans = _plans(schedule, [TENSOR])
    with pytest.warns(UserWarning, match="reads the value of a tensor .* runs its Python in every"):
        plans(torch.ones(2))
    for x in (torch.full((2,), 3.0), torch.zeros(2)):
        assert torch.equal(plans(x), schedule(x))
    assert not plans.sources


def test_a_tensor_that_is_neither_argument_nor_made_is_not_planned():
    hidden = torch.ones(2)
    plans = _plans(lambda x: x + hidden, [TENSOR])
    with pytest.warns(UserWarning, match="neither an argument of a schedule nor made by it"):
        plans(torch.ones(2))
    hidden = torch.full((2,), 5.0)
    assert torch.equal(plans(torch.ones(2)), torch.full((2,), 6.0))


def test_tables_made_by_an_import_are_ignored():
    def schedule(x):
        torch.tensor([1.0, 2.0]).mul_(3)
        return x * 2

    plans = _plans(schedule, [TENSOR])
    for value in (1.0, 2.0):
        assert torch.equal(plans(torch.full((2,), value)), torch.full((2,), 2 * value))


def test_memory_is_freed_as_early_as_by_the_schedule():
    """Two steps that each need one buffer of their own: a replay that kept the first would need twice the memory."""

    def schedule(x):
        total = x.new_zeros(())
        for _ in range(4):
            total = total + x.repeat(1000).sum()
        return total

    plans = _plans(schedule, [TENSOR])
    x = torch.ones(1000)
    plans(x)
    allocated = []
    with torch.profiler.profile(profile_memory=True) as profile:
        plans(x)
    total = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            allocated.append(total)
    assert max(allocated) < 1.5 * 4 * 10**6


def test_two_arguments_in_one_memory_are_not_taken_for_each_other():
    plans = _plans(lambda x, y: x[1:] - 2 * y[1:], [TENSOR, TENSOR])
    x, y = torch.randn(4), torch.randn(4)
    assert torch.equal(plans(x, x), -x[1:])
    assert torch.equal(plans(x, y), x[1:] - 2 * y[1:])
    assert torch.equal(plans(x, x), -x[1:])


def test_which_tensors_share_a_buffer_is_in_the_signature_if_asked():
    def schedule(x, weights):
        shared = weights[0].untyped_storage()._cdata == weights[1].untyped_storage()._cdata
        return x * (2 if shared else 3)

    plans = _plans(schedule, [TENSOR, TENSORS], buffers=lambda x, weights: weights)
    x, both = torch.ones(2), torch.ones(2, 4)
    for _ in range(2):
        assert torch.equal(plans(x, [both[0], both[1]]), x * 2)
        assert torch.equal(plans(x, [torch.ones(4), torch.ones(4)]), x * 3)


def test_empty_tensors_run_the_schedule():
    plans = _plans(lambda x: x * 2, [TENSOR])
    assert plans(torch.ones(0, 3)).shape == (0, 3)
    assert not plans.sources


class _Subclass(torch.Tensor):
    """A tensor with code of its own."""


def test_subclasses_are_left_to_torch():
    seen = []
    plans = _plans(lambda x: x * 2, [TENSOR], otherwise=lambda x: (seen.append(type(x)), x * 2)[1])
    x = torch.ones(2)
    for tensor in (x, torch.nn.Parameter(x), x.as_subclass(_Subclass), x):
        assert torch.equal(plans(tensor).detach().as_subclass(torch.Tensor), x * 2)
    assert seen == [_Subclass]
    assert len(plans.sources) == 2


def test_old_plans_are_dropped(monkeypatch):
    monkeypatch.setattr(plan, "MAX_PLANS", 3)
    plans = _plans(lambda x: x * 2, [TENSOR])
    for length in [*range(1, 8), 1]:
        assert torch.equal(plans(torch.ones(length)), torch.full((length,), 2.0))
    assert len(plans.sources) == len(plans._plans) == 3


def test_clear_drops_every_plan():
    plans = _plans(lambda x: x * 2, [TENSOR])
    plans(torch.ones(2))
    plan.clear()
    assert not plans.sources
    assert torch.equal(plans(torch.ones(2)), torch.full((2,), 2.0))


def test_threads_may_share_a_plan():
    plans = _plans()
    wrong = []

    def work(seed):
        arguments = _arguments(seed)
        expected = _schedule(*arguments)
        for _ in range(50):
            try:
                _assert_same(plans(*arguments), expected)
            except AssertionError as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inside_inference_mode_and_outside():
    plans = _plans()
    arguments = _arguments(0)
    with torch.inference_mode():
        plans(*arguments)
    _assert_same(plans(*arguments), _schedule(*arguments))
    assert not plans(*arguments)[0].is_inference()


class _Add:
    """A stand-in for a compiled kernel that gets addresses: ``out[:n] = a[:n] + FACTOR · b[:n]``."""

    arg_names = ("a", "b", "out", "n", "FACTOR")
    function = packed_metadata = None

    def launch(self, a, b, out, n, factor):
        planner = recorder.current()
        with planner.pause() if planner else contextlib.nullcontext():
            out.view(-1)[:n] = a.view(-1)[:n] + factor * b.view(-1)[:n]
        if planner:
            planner.launched(self, self, (1,), (a, b, out, n), {"FACTOR": factor}, {})

    def run(self, gx, gy, gz, stream, function, metadata, _, enter, leave, a, b, out, n, factor):
        a, b, out = ((ctypes.c_float * n).from_address(address) for address in (a, b, out))
        for i in range(n):
            out[i] = a[i] + factor * b[i]


def _random_schedule(seed):
    """Launches that write temporary tensors of many sizes and read any of the earlier ones, also parts of them."""
    numbers = random.Random(seed)
    add = _Add()
    steps = [
        (numbers.random(), numbers.random(), numbers.randint(8, 300), numbers.choice((0, 1, 3)))
        for _ in range(12)
    ]

    def schedule(x):
        values = [x]
        for first, second, size, start in steps:
            a, b = (values[int(part * len(values))][start:] for part in (first, second))
            out = x.new_zeros(8) if size < 12 else x.new_empty(size)
            n = min(a.numel(), b.numel(), out.numel())
            add.launch(a, b, out, n, 0.5)
            values.append(out[:n])
        result = x.new_empty(4)
        add.launch(values[-1], values[3], result, 4, 2.0)
        return result, values[-2].clone()

    return schedule


@pytest.mark.parametrize("seed", range(20))
def test_temporary_tensors_share_one_allocation_without_overlap(seed):
    """Values of which only kernels see the address lie in one buffer, each where none is that is still read."""
    schedule = _random_schedule(seed)
    plans = Plans(schedule, [TENSOR])
    plans(torch.randn(300))
    (source,) = plans.sources.values()
    assert source.count("arena = empty(") == 1
    assert source.count(" = empty(") < 6
    for other in range(3):
        x = torch.randn(300, generator=torch.Generator().manual_seed(other))
        for found, expected in zip(plans(x), schedule(x), strict=True):
            torch.testing.assert_close(found, expected)
