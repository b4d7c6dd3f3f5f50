"""Four-bit NormalFloat weights in the layout of bitsandbytes: quantise, store, dequantise."""

from peftkit_kernels.storage.nf4.op import dequantize_nf4, quantize_nf4
from peftkit_kernels.storage.nf4.reference import dequantize_nf4_reference
from peftkit_kernels.storage.nf4.weight import NestedAbsmax, NF4Weight

__all__ = [
    "NF4Weight",
    "NestedAbsmax",
    "dequantize_nf4",
    "dequantize_nf4_reference",
    "quantize_nf4",
]
