"""Comparison with a formula written out independently, in float64."""

import torch

LIMIT = 1e-6
"""Largest error in float32, relative to the largest element: about eight roundings."""


def assert_equals(
    actual: torch.Tensor, oracle: torch.Tensor, dtype: torch.dtype | None = None
) -> None:
    """Raise where ``actual`` is further from ``oracle`` than ``LIMIT``, or in float64 than as many of its roundings.

    Args:
        actual: What the library gives.
        oracle: The same in float64.
        dtype: What ``actual`` is computed in, where that is narrower than what it is returned in.
    """
    assert actual.shape == oracle.shape
    roundings = LIMIT / torch.finfo(torch.float32).eps
    limit = roundings * torch.finfo(dtype or actual.dtype).eps
    error = (actual.double() - oracle).abs().max() / oracle.abs().max()
    assert error <= limit, f"{float(error):.3g} of the largest element off, {limit:.3g} allowed"
