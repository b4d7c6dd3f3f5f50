"""Whether two forwards give the same logits, up to rounding."""

from __future__ import annotations

from typing import Any


def change(first: Any, second: Any) -> float:
    """The largest difference of two tensors of logits, or 0 if rounding explains it; NaN if one of them has NaN.

    What adds exact zeros may still change the order of sums: tokens are sorted to other experts, or a quantised weight is decoded by other
    code. Behind many layers that changes up to half of the digits. What a model really reads changes the first ones.
    """
    import torch

    eps = torch.finfo(first.dtype).eps
    allowed = max(64 * eps, eps**0.5) * first.abs().max().item()
    difference = (first - second).abs().max().item()
    return 0.0 if difference <= allowed else difference
