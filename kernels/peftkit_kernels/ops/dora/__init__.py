"""Weight-decomposed low-rank adaptation: the norm of an updated weight, and the linear that uses it."""

from peftkit_kernels.ops.dora.op import dora_linear, dora_norm
from peftkit_kernels.ops.dora.reference import dora_linear_reference, dora_norm_reference

__all__ = ["dora_linear", "dora_linear_reference", "dora_norm", "dora_norm_reference"]
