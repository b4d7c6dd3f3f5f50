"""When two results of one formula are the same."""

import torch
from torch import Tensor


def same_up_to_rounding(a: Tensor, b: Tensor) -> bool:
    """Whether two results of one formula in one dtype differ by no more than their roundings could make them."""
    limit = 32 * torch.finfo(b.dtype).eps * b.double().abs().max()
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and bool((a.double() - b.double()).abs().max() <= limit)
    )
