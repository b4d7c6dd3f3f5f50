"""The largest batch that fits: what trying every batch would find, with few plans."""

import itertools
from types import SimpleNamespace

import pytest

from peftkit.planning.bisection import largest_batch

SIZES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (1024, 2048, 4096)

SHAPES = {
    "rows and weights": lambda rows, length: 500 + rows * length / 64,
    "a large state": lambda rows, length: 5000 + max(4000, rows * length / 64),
    "quadratic in the length": lambda rows, length: (
        500 + rows * (length / 64 + (length / 512) ** 2)
    ),
    "independent of the length": lambda rows, length: 500 + 20 * rows,
    "rounded up": lambda rows, length: 2 * -(-(500 + rows * length / 64) // 2),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_result_is_that_of_trying_all_batches(shape):
    memory, counts = SHAPES[shape], []
    ends = [memory(1, 1024) * 0.9, memory(64, 4096) * 1.1]
    for step in range(41):
        budget, line = ends[0] * (ends[1] / ends[0]) ** (step / 40), None
        for length in LENGTHS:
            calls = []

            def planned(rows, length=length, calls=calls):
                calls.append(rows)
                need = memory(rows, length)
                return SimpleNamespace(
                    reserved_bytes=need,
                    loaded_bytes=400,
                    settings={"seq_len": length, "batch_size": rows},
                    fits=lambda most, need=need: need <= most,
                )

            best, least, line = largest_batch(
                planned, SIZES, budget, line and line.at_length(length)
            )
            fitting = [rows for rows in SIZES if memory(rows, length) <= budget]
            assert (best and best.settings["batch_size"]) == (fitting[-1] if fitting else None)
            assert len(set(calls)) == len(calls)
            assert fitting or least.settings["batch_size"] == 1
            counts.append(len(calls))
    assert sum(counts) / len(counts) < 2.7, "bisection alone needs 3 plans"


def test_one_size_and_the_smallest_that_does_not_fit():
    for need, sizes in itertools.product((5, 50), ((3,), SIZES)):
        made = SimpleNamespace(
            reserved_bytes=need,
            loaded_bytes=1,
            settings={"seq_len": 8},
            fits=lambda most, need=need: need <= most,
        )
        best, least, _ = largest_batch(lambda rows, made=made: made, sizes, 10, None)
        assert (best is made) == (need == 5)
        assert best is not None or least is made
