"""The rank-r passes every LoRA op is made of: shrink, expand and the two tall gradients.

The factors may be float32 masters on a 16-bit input: they are cast (they are small), the input never is. Their gradients
are summed in float32 and rounded once to the dtype of the parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit_kernels.dropout import apply_dropout

_CAST_ROWS = 256
"""Rows of a 16-bit tensor that are cast to float32 at a time."""


# made in every forward: frozen would triple the microseconds
@dataclass(slots=True, eq=False)
class LoRA:
    """One adapter on one linear: ``scale · drop(x) Aᵀ Bᵀ``.

    Attributes:
        A: ``[R, K]``.
        B: ``[N, R]``, the dtype of ``A``.
        scale: ``lora_alpha / r``, or what else the method makes of it.
        p: Dropout probability on the adapter's input.
        seed: Seed of the mask where ``p > 0``.
    """

    A: Tensor
    B: Tensor
    scale: float
    p: float = 0.0
    seed: int = 0

    def numbers(self) -> tuple[float, float, int]:
        """What is not a tensor: ``(scale, p, seed)``."""
        return self.scale, self.p, self.seed


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, without the microsecond that costs where there is nothing to do."""
    return t if t.dtype is dtype else t.to(dtype)


def rows(t: Tensor) -> Tensor:
    """``t`` with its leading axes flattened: ``[M, last]``."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def shrink(x: Tensor, A: Tensor, p: float = 0.0, seed: int = 0) -> Tensor:
    """``drop(x) Aᵀ``, ``[M, R]`` in the dtype of ``x``."""
    return F.linear(apply_dropout(x, p, seed), cast(A, x.dtype))


def expand_(y: Tensor, s: Tensor, B: Tensor, scale: float) -> Tensor:
    """``y += scale · s Bᵀ`` in place."""
    return y.addmm_(s, cast(B, y.dtype).t(), alpha=scale)


def expand_grad_(dx: Tensor, ds: Tensor, A: Tensor) -> Tensor:
    """``dx += ds A`` in place."""
    return dx.addmm_(ds, cast(A, dx.dtype))


def grad_s(dy: Tensor, B: Tensor, scale: float) -> Tensor:
    """``scale · dy B``, ``[M, R]``: the gradient that reaches the adapter's bottleneck."""
    return torch.mm(dy, cast(B, dy.dtype)).mul_(scale)


def grad_b(dy: Tensor, s: Tensor, scale: float, B: Tensor) -> Tensor:
    """``scale · dyᵀ s``, ``[N, R]`` in the dtype of ``B``."""
    if s.dtype is B.dtype:
        # its beta of 0 leaves B unread: the scale without a pass of its own
        return torch.addmm(B, dy.t(), s, beta=0, alpha=scale)
    return cast(_tall(dy, s, B.dtype).mul_(scale), B.dtype)


def grad_a(ds: Tensor, x: Tensor, dtype: torch.dtype, p: float = 0.0, seed: int = 0) -> Tensor:
    """``dsᵀ drop(x)``, ``[R, K]``."""
    return cast(_tall(ds, apply_dropout(x, p, seed), dtype), dtype)


def _tall(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``leftᵀ right`` over the M rows; summed in float32 from blocks of rows where a 16-bit sum would lose digits."""
    if right.dtype is dtype or right.dtype.itemsize >= 4:
        return torch.mm(left.t(), right)
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float32, device=right.device)
    for start in range(0, right.shape[0], _CAST_ROWS):
        rows = slice(start, start + _CAST_ROWS)
        total.addmm_(left[rows].float().t(), right[rows].float())
    return total
