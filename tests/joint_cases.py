"""What the tests of adapters that are trained together share: the comparison with a run alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

LR = 1e-2
"""The largest learning rate of the runs."""


def history(folder: Path) -> list[dict]:
    """The log of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Two runs have the same losses, norms and rates at every step, and the same weights, up to the order of sums."""
    for here, there in zip(history(ours), history(theirs), strict=True):
        names = {n for n in there if not n.endswith(("runtime", "per_second", "_flos"))}
        assert names <= here.keys()
        for name in names:
            assert here[name] == pytest.approx(there[name], rel=1e-4, abs=1e-6), name
    results = [json.loads((folder / "result.json").read_text()) for folder in (ours, theirs)]
    assert [one["status"] for one in results] == ["finished", "finished"]
    assert [one["problems"] for one in results] == [[], []]
    assert results[0]["steps"] == results[1]["steps"]
    assert results[0]["metrics"] == pytest.approx(results[1]["metrics"], rel=1e-4, abs=1e-6)
    here, there = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (ours, theirs)
    )
    assert here.keys() == there.keys()
    for name in here:
        # Adam moves a weight by about the rate in a step, whatever the size of the gradient.
        assert (here[name] - there[name]).abs().max() < 0.02 * LR, name
