"""Compare two results of the same formula up to rounding."""

import torch
from torch import Tensor


def same_up_to_rounding(a: Tensor, b: Tensor) -> bool:
    """Whether two results of the same formula in the same dtype differ by no more than rounding errors."""
    limit = 32 * torch.finfo(b.dtype).eps * b.double().abs().max()
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and bool((a.double() - b.double()).abs().max() <= limit)
    )
