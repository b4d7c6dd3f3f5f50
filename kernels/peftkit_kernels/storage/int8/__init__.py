"""Eight-bit weights with one scale for each output row, in the layout of bitsandbytes: quantise, store, dequantise."""

from peftkit_kernels.storage.int8.op import dequantize_int8, quantize_int8
from peftkit_kernels.storage.int8.reference import dequantize_int8_reference
from peftkit_kernels.storage.int8.weight import Int8ComputeWeight, Int8Weight

__all__ = [
    "Int8ComputeWeight",
    "Int8Weight",
    "dequantize_int8",
    "dequantize_int8_reference",
    "quantize_int8",
]
