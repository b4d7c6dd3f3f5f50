"""The steps of updates by adapter by Triton kernels, which read rows through the order of the plan."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.ops.grouped_lora.passes import (
    Table,
    grouped_expand,
    grouped_shrink,
    grouped_tall,
)


class TritonPasses:
    """The steps of ``ops.grouped_lora.schedule``. ``s`` and ``ds`` are ``[M, R]``, undefined in rows without an adapter."""

    def gather(self, x: Tensor, table: Table) -> Tensor:
        """Rows ``x [M, K]`` as the other steps read them: where they are."""
        del table
        return x

    def scales(self, scale: Tensor, table: Table, dtype: torch.dtype) -> Tensor:
        """The scales as the other steps read them: ``[E]``."""
        del table, dtype
        return scale

    def shrink(self, x: Tensor, A: Tensor, table: Table) -> Tensor:
        """``s = A[e] x[m]`` for rows ``x [M, K]``."""
        return grouped_shrink(x, A, None, table)

    def update(self, y: Tensor, s: Tensor, B: Tensor, scale: Tensor, table: Table) -> Tensor:
        """``y[m] + scale[e] · B[e] s[m]`` for rows ``y [M, N]``; rows without an adapter are those of ``y``."""
        return grouped_expand(s, B, scale, y, table, y.dtype)

    def grad_s(self, dy: Tensor, B: Tensor, scale: Tensor, table: Table) -> Tensor:
        """``ds = scale[e] · dy[m] B[e]``."""
        return grouped_shrink(dy, B.transpose(1, 2), scale, table)

    def grad_x(self, ds: Tensor, A: Tensor, table: Table, dtype: torch.dtype) -> Tensor:
        """``ds[m] A[e]``, ``[M, K]`` in ``dtype``; 0 in rows without an adapter."""
        return grouped_expand(ds, A.transpose(1, 2), None, None, table, dtype)

    def grad_a(self, x: Tensor, ds: Tensor, A: Tensor, table: Table) -> Tensor:
        """``Σ ds[m]ᵀ x[m]`` over the rows of each adapter."""
        dA = A.new_empty(A.shape)
        grouped_tall(x, ds, None, dA, table)
        return dA

    def grad_b(self, dy: Tensor, s: Tensor, B: Tensor, scale: Tensor, table: Table) -> Tensor:
        """``scale[e] · Σ dy[m]ᵀ s[m]`` over the rows of each adapter."""
        dB = B.new_empty(B.shape)
        grouped_tall(dy, s, scale, dB.transpose(1, 2), table)
        return dB
