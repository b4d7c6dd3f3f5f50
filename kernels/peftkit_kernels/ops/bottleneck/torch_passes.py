"""The steps of a bottleneck adapter by torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels import low_rank
from peftkit_kernels.gemm import matmul_nn, matmul_nt
from peftkit_kernels.low_rank import cast, rows
from peftkit_kernels.ops.bottleneck.reference import ACTIVATIONS


class TorchPasses:
    """The steps of ``ops.bottleneck.schedule``."""

    def rows(self, t: Tensor) -> Tensor:
        """``t`` as rows ``[M, D]``."""
        return rows(t)

    def adapt(
        self,
        h: Tensor,
        down: Tensor,
        down_bias: Tensor | None,
        up: Tensor,
        up_bias: Tensor | None,
        base: Tensor | None,
        scale: float,
        act: str,
    ) -> tuple[Tensor, Tensor]:
        """``y`` for rows ``h [M, D]``, and ``z = h downᵀ + down_bias``, ``[M, R]``."""
        dtype = h.dtype
        z = matmul_nt(h, cast(down, dtype), None if down_bias is None else cast(down_bias, dtype))
        # the scale multiplies act(z) and the bias, so that no pass over y is needed for it
        bias = None if up_bias is None else cast(up_bias, dtype) * scale
        y = matmul_nt(ACTIVATIONS[act](z).mul(scale), cast(up, dtype), bias)
        return y.add_(h if base is None else base), z

    def grads_inside(
        self,
        dy: Tensor,
        z: Tensor,
        down: Tensor,
        up: Tensor,
        scale: float,
        act: str,
        *,
        has_base: bool,
        needs_a: bool,
        needs_dz: bool,
        needs_dh: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``a = act(z)``, ``dz`` and ``dh``; ``a`` and ``dz`` also if they are not needed."""
        del needs_a, needs_dz  # the way to dh makes both
        a, dz = _activation_backward(matmul_nn(dy, cast(up, dy.dtype)).mul_(scale), z, act)
        if not needs_dh:
            return a, dz, None
        dh = matmul_nn(dz, cast(down, dz.dtype))
        return a, dz, dh if has_base else dh.add_(dy)

    def grad_down(self, dz: Tensor, h: Tensor, down: Tensor) -> Tensor:
        """``dzᵀ h`` in the dtype of ``down``."""
        return low_rank.grad_a(dz, h, down.dtype)

    def grad_up(self, dy: Tensor, a: Tensor, scale: float, up: Tensor) -> Tensor:
        """``scale · dyᵀ a`` in the dtype of ``up``."""
        return low_rank.grad_b(dy, a, scale, up)

    def sum_of_rows(self, grad: Tensor, dtype: torch.dtype, scale: float | None = None) -> Tensor:
        """``scale · Σ grad`` in ``dtype``, summed in float32 if a 16-bit ``grad`` is summed for a float32 ``dtype``."""
        total = grad.sum(0, dtype=torch.promote_types(grad.dtype, dtype))
        return cast(total if scale is None else total.mul_(scale), dtype)


def _activation_backward(da: Tensor, z: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """``act(z)``, recomputed, and ``da ∘ act'(z)`` by torch's own derivative."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        a = ACTIVATIONS[act](leaf)
        (dz,) = torch.autograd.grad(a, leaf, da)
    return a.detach(), dz
