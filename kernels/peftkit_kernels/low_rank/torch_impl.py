"""The rank-r passes that every LoRA op uses: shrink, expand and the two tall gradients.

As in PEFT, an adapter is computed in the wider of two dtypes, that of its factors and that of the input (``adapter_dtype``):
float32 factors on a 16-bit input give a float32 s and ds. Only tensors of width R are stored in that dtype. The input is
cast one block of rows at a time, and a result of the input's size is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit_kernels.core import structure
from peftkit_kernels.core.blocks import starts
from peftkit_kernels.core.dropout import apply_dropout
from peftkit_kernels.gemm import whole_rows

_CPU_BLOCK, _GPU_BLOCK = 2**18, 2**24
"""Elements that are cast at a time. On the CPU 1 MiB of float32 stays in the second-level cache: a shrink of 1024 x 2048 in
bfloat16 takes 1.6 ms, against 2.8 ms with a cast of the whole input. On a GPU larger blocks make fewer launches."""


# not frozen: one is created in every forward, and frozen=True would triple the time
@dataclass(slots=True, eq=False)
class LoRA:
    """One adapter on one linear: ``scale · drop(x) Aᵀ Bᵀ``.

    Attributes:
        A: ``[R, K]``. The adapter is computed in ``adapter_dtype``.
        B: ``[N, R]``, the dtype of ``A``.
        scale: ``lora_alpha / r``, or another factor that the method computes.
        p: Dropout probability on the adapter's input.
        seed: Seed of the mask if ``p > 0``.
    """

    A: Tensor
    B: Tensor
    scale: float
    p: float = 0.0
    seed: int = 0

    def numbers(self) -> tuple[float, float, int]:
        """The fields that are not tensors: ``(scale, p, seed)``."""
        return self.scale, self.p, self.seed


structure.register(
    LoRA,
    structure.Codec(
        lambda lora: ((lora.A, lora.B), (lora.seed,), (lora.scale, lora.p)),
        lambda tensors, seeds, numbers: LoRA(*tensors, *numbers, *seeds),
    ),
)


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``. If the dtype is already right, this saves a microsecond."""
    return t if t.dtype is dtype else t.to(dtype)


def rows(t: Tensor) -> Tensor:
    """``t`` with its leading axes flattened: ``[M, last]``."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def unflatten(y: Tensor, shape: torch.Size) -> Tensor:
    """``y [M, N]`` as ``[*shape[:-1], N]``, in a form that autograd does not treat as a view. Do not use ``y`` afterwards.

    A view returned by an autograd function could not be changed in place, and models do change outputs in place.
    """
    if len(shape) == 2:
        return y
    if y.is_contiguous():
        return y.resize_(*shape[:-1], y.shape[-1])  # takes a fifth of the time of _unsafe_view
    return torch.ops.aten._unsafe_view(y, (*shape[:-1], y.shape[-1]))


def adapter_dtype(x: Tensor, factor: Tensor) -> torch.dtype:
    """The dtype in which an adapter with this factor is computed on ``x``: the wider of the two, float32 for float16 and bfloat16."""
    if x.dtype is factor.dtype:
        return x.dtype
    return torch.promote_types(x.dtype, factor.dtype)


def blocks(t: Tensor) -> Iterator[slice]:
    """Blocks of the rows of ``t [M, columns]`` that are small enough to be cast one at a time."""
    elements = _CPU_BLOCK if t.is_cpu else _GPU_BLOCK
    step = max(16, elements // max(1, t.shape[1]))
    for start in starts(t.shape[0], step):
        yield slice(start, start + step)


def shrink(x: Tensor, A: Tensor, p: float = 0.0, seed: int = 0) -> Tensor:
    """``drop(x) Aᵀ``, ``[M, R]`` in ``adapter_dtype``."""
    dtype = adapter_dtype(x, A)
    A = cast(A, dtype)
    if x.dtype is dtype:
        return F.linear(whole_rows(apply_dropout(x, p, seed)), A)
    s = x.new_empty(x.shape[0], A.shape[0], dtype=dtype)
    for block in blocks(x):
        part = apply_dropout(x[block].to(dtype), p, seed, first_row=block.start)
        torch.mm(part, A.t(), out=s[block])
    return s


def expand_(y: Tensor, s: Tensor, B: Tensor, scale: float) -> Tensor:
    """``y += scale · s Bᵀ`` in place, summed in the dtype of ``s`` and rounded once."""
    B = cast(B, s.dtype).t()
    if y.dtype is s.dtype:
        return y.addmm_(whole_rows(s), B, alpha=scale)
    for block in blocks(y):
        y[block] = y[block].to(s.dtype).addmm_(s[block], B, alpha=scale)
    return y


def expand_grad_(dx: Tensor, ds: Tensor, A: Tensor, p: float = 0.0, seed: int = 0) -> Tensor:
    """``dx += drop'(ds A)`` in place, summed in the dtype of ``ds`` and rounded once."""
    A = cast(A, ds.dtype)
    if dx.dtype is ds.dtype and p == 0.0:
        return dx.addmm_(whole_rows(ds), A)
    if dx.dtype is ds.dtype:
        return dx.add_(apply_dropout(torch.mm(whole_rows(ds), A), p, seed))
    for block in blocks(dx):
        update = apply_dropout(torch.mm(ds[block], A), p, seed, first_row=block.start)
        dx[block] = update.add_(dx[block])
    return dx


def grad_s(dy: Tensor, B: Tensor, scale: float) -> Tensor:
    """``scale · dy B``, ``[M, R]`` in ``adapter_dtype``: the gradient of ``s``."""
    dtype = adapter_dtype(dy, B)
    B = cast(B, dtype)
    if dy.dtype is dtype:
        return torch.mm(whole_rows(dy), B).mul_(scale)
    ds = dy.new_empty(dy.shape[0], B.shape[1], dtype=dtype)
    for block in blocks(dy):
        torch.mm(dy[block].to(dtype), B, out=ds[block])
    return ds.mul_(scale)


def grad_b(dy: Tensor, s: Tensor, scale: float, B: Tensor) -> Tensor:
    """``scale · dyᵀ s``, ``[N, R]`` in the dtype of ``B``."""
    if dy.dtype is s.dtype is B.dtype:
        # beta=0 ignores the values of B: addmm applies the scale without a separate multiply
        return torch.addmm(B, dy.t(), s, beta=0, alpha=scale)
    return cast(_tall(dy, s, B.dtype).mul_(scale), B.dtype)


def grad_a(ds: Tensor, x: Tensor, dtype: torch.dtype, p: float = 0.0, seed: int = 0) -> Tensor:
    """``dsᵀ drop(x)``, ``[R, K]`` in ``dtype``."""
    return cast(_tall(ds, x, dtype, p, seed), dtype)


def _tall(left: Tensor, right: Tensor, dtype: torch.dtype, p: float = 0.0, seed: int = 0) -> Tensor:
    """``leftᵀ drop(right)``, summed over the M rows: in float32 from blocks of rows if a 16-bit sum would lose digits."""
    wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), dtype)
    if left.dtype is right.dtype and (wide is left.dtype or left.dtype.itemsize >= 4):
        return torch.mm(left.t(), apply_dropout(right, p, seed))
    total = torch.zeros(left.shape[1], right.shape[1], dtype=wide, device=right.device)
    for block in blocks(left if left.shape[1] > right.shape[1] else right):
        part = apply_dropout(right[block].to(wide), p, seed, first_row=block.start)
        total.addmm_(left[block].to(wide).t(), part)
    return total
