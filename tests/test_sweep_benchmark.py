"""The benchmark of sweeps: no ratio if losses differ or the machine was busy."""

import pytest
from benchmark_scripts import load_script


@pytest.fixture(scope="module")
def sweeps():
    return load_script("sweeps")


def result(sweep_loss=2.0, disturbed=None):
    return {
        "environment": {"cpu": "C", "threads": 1},
        **{"steps": 3, "batch": 2, "length": 8, "base": "fp32"},
        "rounds": [
            {
                "sweep": {"seconds": 4.0, "training": 3.0, "losses": {"r=8": sweep_loss}},
                "runs": {"seconds": 10.0, "training": 6.0, "losses": {"r=8": 2.0}},
                "disturbed": disturbed,
            }
        ],
    }


def test_the_ratio_is_that_of_the_whole_processes(sweeps):
    table = sweeps.table(result())
    assert "| sweep | 4.0 | 3.0 |" in table
    assert "takes 0.40 of the time of the runs (0.50 in training), within the bar of 0.5" in table


def test_only_adapters_that_were_kept_are_compared(sweeps):
    found = result() | {"keep_best": 1}
    found["rounds"][0]["runs"]["losses"]["r=16"] = 3.0
    table = sweeps.table(found)
    assert "2 adapters, 3 steps, 2 x 8 tokens each, base fp32, 1 kept after 30 %" in table
    assert "takes 0.40 of the time of the runs" in table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep_loss": 2.1}, "The losses differ by 0.05, so there is no ratio"),
        ({"sweep_loss": float("nan")}, "The losses differ by nan, so there is no ratio"),
        ({"disturbed": "the machine was busy"}, "There is no ratio: the machine was busy"),
    ],
)
def test_there_is_no_ratio_of_wrong_or_disturbed_results(changes, message, sweeps):
    table = sweeps.table(result(**changes))
    assert message in table
    assert "of the time of the runs" not in table
