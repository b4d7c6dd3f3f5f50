"""Weights as they are stored after an adapter was merged into them: quantised again, in the layouts of bitsandbytes."""

from peftkit_kernels.storage.requantized.reference import requantize
from peftkit_kernels.storage.requantized.weight import RequantizedWeight

__all__ = ["RequantizedWeight", "requantize"]
