"""Output head and cross entropy in one op, which never stores the logits of a whole batch."""

from peftkit_kernels.ops.linear_cross_entropy.op import linear_cross_entropy
from peftkit_kernels.ops.linear_cross_entropy.reference import (
    RowLoss,
    linear_cross_entropy_reference,
)

__all__ = ["RowLoss", "linear_cross_entropy", "linear_cross_entropy_reference"]
