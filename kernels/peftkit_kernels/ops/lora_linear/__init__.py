"""A frozen linear with a low-rank update: one op, forward and backward."""

from peftkit_kernels.ops.lora_linear.op import lora_linear
from peftkit_kernels.ops.lora_linear.reference import lora_linear_reference

__all__ = ["lora_linear", "lora_linear_reference"]
