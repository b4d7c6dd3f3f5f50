"""Compare two results of the same formula up to rounding."""

import torch
from torch import Tensor


def same_up_to_rounding(a: Tensor, b: Tensor, scale: float = 0.0) -> bool:
    """Whether two results of the same formula in the same dtype differ by no more than rounding errors.

    Args:
        a: One result.
        b: The other.
        scale: The size of terms that cancel in the formula, if they are larger than the results.
    """
    limit = 32 * torch.finfo(b.dtype).eps * b.double().abs().max().clamp(min=scale)
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and bool((a.double() - b.double()).abs().max() <= limit)
    )
