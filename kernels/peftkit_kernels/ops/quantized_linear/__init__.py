"""A linear on a quantised weight with a low-rank update: NF4 and 8-bit."""

from peftkit_kernels.ops.quantized_linear.op import int8_linear, nf4_linear

__all__ = ["int8_linear", "nf4_linear"]
