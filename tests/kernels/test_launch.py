"""What a launch says about its tensors: how their rows may be accessed."""

import pytest
import torch

from peftkit_kernels.core.launch import aligned, step_of


def rows(columns, distance=None, first=0, dtype=torch.bfloat16):
    distance = columns if distance is None else distance
    return torch.empty(first + 3 * distance, dtype=dtype).as_strided(
        (3, columns), (distance, 1), first
    )


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (rows(64), True),
        (rows(64, 80), True),
        (rows(64).t(), True),
        (rows(64)[:1].expand(3, 64), True),
        (rows(64, first=8), True),
        (rows(64, first=4, dtype=torch.float32), True),
        (torch.empty(2, 3, 64), True),
        (torch.empty(0, 64), True),
        (None, True),
        (rows(63), False),
        (rows(72), False),
        (rows(63, 64), False),
        (rows(64, 65), False),
        (rows(63).t(), False),
        (rows(64, first=1), False),
        (rows(64, first=2, dtype=torch.float32), False),
        (torch.empty(2, 3, 8), False),
    ],
)
def test_rows_are_aligned_where_16_divides_all_there_is_to_know(tensor, expected):
    assert aligned(tensor) is expected
    assert aligned(rows(64), tensor) is expected


@pytest.mark.parametrize(
    ("numbers", "step"), [((8, 16), 8), ((24, 0), 8), ((8, 4), 1), ((1,), 1), ((12, 8), 1)]
)
def test_ranks_go_in_eights_where_all_do(numbers, step):
    assert step_of(*numbers) == step
