"""Attention whose scores never reach memory, for float32 on the CPU."""

from peftkit_kernels.attention.op import HEAD_SIZE_MULTIPLE, attention, native_obstacle
from peftkit_kernels.attention.reference import attention_reference

__all__ = ["HEAD_SIZE_MULTIPLE", "attention", "attention_reference", "native_obstacle"]
