"""Frozen linears with low-rank updates that share one input."""

from peftkit_kernels.ops.lora_qkv.op import lora_qkv
from peftkit_kernels.ops.lora_qkv.reference import lora_qkv_reference

__all__ = ["lora_qkv", "lora_qkv_reference"]
