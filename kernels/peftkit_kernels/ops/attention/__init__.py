"""Attention whose scores never reach memory: for float32 on the CPU, and for 16 bits on Hopper GPUs and later."""

from peftkit_kernels.ops.attention.cudnn import device_obstacle, hardware_obstacle, switched_off
from peftkit_kernels.ops.attention.op import (
    HEAD_SIZE_MULTIPLE,
    attention,
    native_obstacle,
    obstacle,
)
from peftkit_kernels.ops.attention.reference import attention_reference

__all__ = [
    "HEAD_SIZE_MULTIPLE",
    "attention",
    "attention_reference",
    "device_obstacle",
    "hardware_obstacle",
    "native_obstacle",
    "obstacle",
    "switched_off",
]
