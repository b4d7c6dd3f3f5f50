"""The rank-r passes that every LoRA op uses: ``torch_impl`` from torch ops, ``passes`` by Triton kernels."""

from peftkit_kernels.low_rank.torch_impl import (
    LoRA,
    adapter_dtype,
    blocks,
    cast,
    expand_,
    expand_grad_,
    grad_a,
    grad_b,
    grad_s,
    rows,
    shrink,
    unflatten,
)

__all__ = [
    "LoRA",
    "adapter_dtype",
    "blocks",
    "cast",
    "expand_",
    "expand_grad_",
    "grad_a",
    "grad_b",
    "grad_s",
    "rows",
    "shrink",
    "unflatten",
]
