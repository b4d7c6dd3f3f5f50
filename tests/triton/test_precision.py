"""Adapters are at least half as precise as PEFT's in every pair of dtypes of base and adapter, by Triton kernels."""

import pytest
import torch
from precision_cases import EAGER, PAIRS, errors, make

every_pair = pytest.mark.parametrize(
    ("dtype", "factors"), PAIRS, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def small(name, dtype, factors):
    """The case of an op, with fewer rows for the loss: the interpreter runs one program for each of them."""
    rows = {"rows": (2, 20)} if name.startswith("linear_cross_entropy") else {}
    return make(name, dtype, factors, **rows)


@every_pair
@pytest.mark.parametrize("name", EAGER)
def test_no_further_from_float64_than_twice_as_far_as_peft(name, dtype, factors):
    for key, (error, plain) in errors(small(name, dtype, factors), name, backend="triton").items():
        assert error <= 2 * plain, f"{key}: {error:.3g}, PEFT {plain:.3g}"


@pytest.mark.parametrize("name", EAGER)
def test_small_gradients_of_a_float16_base_keep_their_digits(name):
    case = small(name, torch.float16, torch.float32)
    for key, (error, plain) in errors(case, name, size=1e-4, backend="triton").items():
        assert error <= 2 * plain, f"{key}: {error:.3g}, PEFT {plain:.3g}"
