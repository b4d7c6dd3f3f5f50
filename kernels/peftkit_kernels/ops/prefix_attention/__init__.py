"""Attention with a learned prefix of keys and values, as two passes merged by their log-sum-exps."""

from peftkit_kernels.ops.prefix_attention.op import prefix_attention
from peftkit_kernels.ops.prefix_attention.reference import prefix_attention_reference

__all__ = ["prefix_attention", "prefix_attention_reference"]
