"""A bottleneck adapter: one op, forward and backward."""

from peftkit_kernels.ops.bottleneck.op import bottleneck
from peftkit_kernels.ops.bottleneck.reference import ACTIVATIONS, bottleneck_reference

__all__ = ["ACTIVATIONS", "bottleneck", "bottleneck_reference"]
