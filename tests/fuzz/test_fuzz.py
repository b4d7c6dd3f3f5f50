"""The set that every run of the tests examines: each corner, and random cases of one seed, the usual families only."""

import pytest
from fuzz.corners import CORNERS
from fuzz.session import case_at
from fuzz.worker import verdict
from markers import slow_if

SEED = 11
CASES = len(CORNERS) + 100
SHARDS = 12
"""The tests share the cases evenly, so that several processes can run them."""


@pytest.mark.parametrize("shard", slow_if(lambda shard: shard >= SHARDS // 4, range(SHARDS)))
def test_no_case_finds_a_fault(shard, one_thread):
    failures, silent = [], 0
    numbers = range(shard, CASES, SHARDS)
    for number in numbers:
        case = case_at(SEED, number)
        found = verdict(case)
        silent += isinstance(found, str)
        if found is not None and not isinstance(found, str):
            failures.append(f"case {number}: {found}\n  {case}")
    assert not failures, "\n".join(failures)
    assert silent < len(numbers) / 2, "most cases say nothing, so that they test nothing"
