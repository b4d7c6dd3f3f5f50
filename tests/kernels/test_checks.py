"""Checks of arguments, and what autocast means for a device."""

import pytest
import torch

from peftkit_kernels.core.checks import autocast_dtype, is_autocast_enabled, without_autocast


@pytest.mark.parametrize("device_type", ["meta", "lazy", "vulkan"])
def test_device_types_without_autocast(device_type):
    with pytest.raises(RuntimeError):
        torch.is_autocast_enabled(device_type)
    assert is_autocast_enabled(device_type) is False


def test_a_tensor_on_the_meta_device_under_autocast_of_the_cpu():
    x = torch.ones(2, device="meta")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert autocast_dtype(x) is None
        with without_autocast(x):
            assert is_autocast_enabled("cpu")


def test_autocast_of_the_cpu():
    x = torch.ones(2)
    assert not is_autocast_enabled("cpu")
    assert autocast_dtype(x) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_autocast_enabled("cpu")
        assert autocast_dtype(x) is torch.bfloat16
        assert autocast_dtype(x.double()) is None
        assert autocast_dtype(x.long()) is None
        with without_autocast(x):
            assert not is_autocast_enabled("cpu")
