"""Kernels run in the faithful interpreter, and what a kernel does not write is NaN."""

import pytest
import torch

from lab.interp import faithful


@pytest.fixture(autouse=True)
def _faithful():
    with faithful():
        yield


@pytest.fixture(autouse=True)
def _nan_in_new_memory():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)
