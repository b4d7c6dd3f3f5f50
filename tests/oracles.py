"""Comparison with an independent formula in float64."""

import torch

LIMIT = 1e-6
"""Largest error in float32, relative to the largest element: about eight roundings."""


def assert_equals(
    actual: torch.Tensor, oracle: torch.Tensor, dtype: torch.dtype | None = None
) -> None:
    """Assert that the error of ``actual`` against ``oracle`` is at most ``LIMIT``, or the same number of roundings of another dtype.

    Args:
        actual: The result of the library.
        oracle: The result of the formula in float64.
        dtype: The dtype in which ``actual`` was computed, if it is narrower than that of ``actual``.
    """
    assert actual.shape == oracle.shape
    roundings = LIMIT / torch.finfo(torch.float32).eps
    limit = roundings * torch.finfo(dtype or actual.dtype).eps
    error = (actual.double() - oracle).abs().max() / oracle.abs().max()
    assert error <= limit, f"{float(error):.3g} of the largest element off, {limit:.3g} allowed"
