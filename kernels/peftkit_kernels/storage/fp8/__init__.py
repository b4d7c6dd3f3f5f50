"""Weights in float8 (e4m3) with one scale for each output row: quantise, store, dequantise."""

from peftkit_kernels.storage.fp8.op import dequantize_fp8, quantize_fp8
from peftkit_kernels.storage.fp8.reference import dequantize_fp8_reference
from peftkit_kernels.storage.fp8.weight import Float8Weight

__all__ = ["Float8Weight", "dequantize_fp8", "dequantize_fp8_reference", "quantize_fp8"]
