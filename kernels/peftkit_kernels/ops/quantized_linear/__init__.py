"""A linear on a quantised weight with a low-rank update: NF4, 8-bit and float8."""

from peftkit_kernels.ops.quantized_linear.op import fp8_linear, int8_linear, nf4_linear

__all__ = ["fp8_linear", "int8_linear", "nf4_linear"]
