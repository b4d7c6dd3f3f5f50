"""When tensors count as parts of one."""

import pytest
import torch

from peftkit_kernels.core.views import as_one_view


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dim", [0, 1])
def test_consecutive_parts_are_one_tensor(dim, device):
    whole = torch.arange(42.0, device=device).view(6, 7)
    found = as_one_view(whole.split([2, 1, whole.shape[dim] - 3], dim), dim)
    assert found is not None
    assert (found.shape, found.stride(), found.storage_offset()) == (whole.shape, (7, 1), 0)
    assert found.untyped_storage()._cdata == whole.untyped_storage()._cdata
    inner = as_one_view(whole.split([2, 1, whole.shape[dim] - 3], dim)[1:], dim)
    assert inner is not None
    assert inner.storage_offset() == 2 * whole.stride(dim)


def test_anything_else_is_not():
    whole = torch.zeros(6, 7)
    a, b, c = whole.split(2)
    for parts in ([b, a], [a, c], [a, b.clone()], [a, b[:, :3]], [a, a]):
        assert as_one_view(parts, 0) is None
    assert as_one_view([whole[:2], whole.view(torch.int32)[2:]], 0) is None
    assert as_one_view([torch.empty(2, 3, device="meta") for _ in range(2)], 0) is None
    left, right = whole.split([3, 4], 1)
    assert as_one_view([left, right], 0) is None
    assert as_one_view([left, right.contiguous()], 1) is None
