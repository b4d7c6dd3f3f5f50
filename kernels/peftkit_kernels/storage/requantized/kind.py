"""A merged and requantised weight as a kind of storage."""

from peftkit_kernels.storage.kind import Kind
from peftkit_kernels.storage.requantized import torch_impl, triton_impl
from peftkit_kernels.storage.requantized.reference import requantize_reference
from peftkit_kernels.storage.requantized.weight import RequantizedWeight

REQUANTIZED = Kind(
    name="requantized",
    weight=RequantizedWeight,
    reference=requantize_reference,
    decode=torch_impl.requantize_into,
    decode_triton=triton_impl.requantize_into,
    layout=RequantizedWeight.layout,
    rebuild=RequantizedWeight.rebuild,
)
