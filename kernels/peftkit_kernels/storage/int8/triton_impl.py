"""8-bit storage by a Triton kernel, as a torch.library op: traceable, and bit for bit the definition."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels.core.namespace import library_name
from peftkit_kernels.storage.by_rows import DequantizeConfig, launch_dequantize
from peftkit_kernels.storage.int8.weight import Int8Weight


@functools.cache
def _kernels() -> Any:
    from peftkit_kernels.storage.int8 import kernels

    return kernels


def dequantize_into(
    q: Int8Weight,
    out: Tensor,
    row_scale: Tensor | None,
    *,
    config: DequantizeConfig | None = None,
) -> Tensor:
    """``dequantize_int8_reference``, bit for bit, written to ``out [N, K]`` of any strides; ``config`` replaces the default."""
    kernel = _kernels().dequantize_kernel
    return launch_dequantize(kernel, q.codes, q.row_absmax, row_scale, out, config)


def _dequantize_op(
    codes: Tensor, row_absmax: Tensor, row_scale: Tensor | None, out: Tensor
) -> None:
    dequantize_into(Int8Weight(codes, row_absmax), out, row_scale)


dequantize_triton = torch.library.custom_op(
    library_name("dequantize_int8"),
    _dequantize_op,
    mutates_args=("out",),
    schema="(Tensor codes, Tensor row_absmax, Tensor? row_scale, Tensor(a!) out) -> ()",
)


@dequantize_triton.register_fake
def _(codes: Tensor, row_absmax: Tensor, row_scale: Tensor | None, out: Tensor) -> None:
    """Nothing to compute: the op returns no tensor, it writes into ``out``."""
