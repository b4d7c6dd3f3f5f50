"""A linear that multiplies in 8 bits a stored weight and activations quantised in each call, with a low-rank update."""

from peftkit_kernels.ops.int8_compute_linear.op import int8_compute_linear
from peftkit_kernels.ops.int8_compute_linear.reference import int8_compute_linear_reference

__all__ = ["int8_compute_linear", "int8_compute_linear_reference"]
