"""Torch functions that ``LazyLogits`` records, or computes without values."""

from __future__ import annotations

import torch

CASTS = {torch.Tensor.float: torch.float32, torch.Tensor.double: torch.float64}

PRODUCTS = {
    torch.mul: torch.mul,
    torch.multiply: torch.mul,
    torch.Tensor.mul: torch.mul,
    torch.Tensor.multiply: torch.mul,
    torch.Tensor.__mul__: torch.mul,
    torch.Tensor.__rmul__: torch.mul,
    torch.div: torch.div,
    torch.divide: torch.div,
    torch.true_divide: torch.div,
    torch.Tensor.div: torch.div,
    torch.Tensor.divide: torch.div,
    torch.Tensor.true_divide: torch.div,
    torch.Tensor.__truediv__: torch.div,
}

KNOWN_WITHOUT_VALUES = frozenset(
    {
        *(
            getattr(torch.Tensor, name).__get__
            for name in (
                "_backward_hooks",
                "_version",
                "device",
                "dtype",
                "grad",
                "grad_fn",
                "is_cpu",
                "is_cuda",
                "is_leaf",
                "is_meta",
                "is_nested",
                "is_quantized",
                "is_sparse",
                "itemsize",
                "layout",
                "nbytes",
                "ndim",
                "output_nr",
                "requires_grad",
                "retains_grad",
                "shape",
            )
        ),
        torch.Tensor.__len__,
        torch.Tensor.dim,
        torch.Tensor.element_size,
        torch.Tensor.get_device,
        torch.Tensor.is_complex,
        torch.Tensor.is_contiguous,
        torch.Tensor.is_floating_point,
        torch.Tensor.is_inference,
        torch.Tensor.nelement,
        torch.Tensor.numel,
        torch.Tensor.retain_grad,
        torch.Tensor.size,
        torch.Tensor.storage_offset,
        torch.Tensor.stride,
        torch.is_complex,
        torch.is_floating_point,
        torch.numel,
    }
)
"""Functions of the logits that need no values."""
