"""The steps of the cross entropy of an output head by torch operations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from peftkit_kernels import low_rank, native
from peftkit_kernels.core.blocks import starts
from peftkit_kernels.gemm import matmul_nn, matmul_nt
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.linear_cross_entropy.reference import RowLoss, wide_dtype

_TILE_BYTES = 2**24
"""The largest allocation for a cast of weights or logits."""


class Rows(NamedTuple):
    """The rows that are computed.

    Attributes:
        hidden: ``[C, D]``.
        target: ``Int64[C]``.
        ignored: ``Bool[C]``, true for rows whose loss and gradient are 0; ``None`` if the targets say it, or there are none.
        places: ``Int64[C]``, which rows of the call these are; ``None`` for all.
    """

    hidden: Tensor
    target: Tensor
    ignored: Tensor | None
    places: Tensor | None


class TorchPasses:
    """The steps of ``ops.linear_cross_entropy.schedule``."""

    def select(self, hidden: Tensor, target: Tensor, ignore_index: int) -> Rows:
        """The rows that are computed.

        On the CPU ignored rows are left out, so that a prompt needs no product with the head. On a GPU the host would have to
        wait for their number, so they are computed and masked.
        """
        counted = target != ignore_index
        if hidden.device.type != "cpu":
            return Rows(hidden, target.where(counted, 0), ~counted, None)
        places = counted.nonzero().squeeze(1)
        if places.shape[0] == target.shape[0]:
            return Rows(hidden, target, None, None)
        return Rows(hidden[places], target[places], None, places)

    def adapter(self, lora: LoRA, dtype: torch.dtype) -> LoRA:
        """The adapter as the other steps read it."""
        del dtype
        return lora

    def shrink(self, h: Tensor, A: Tensor) -> Tensor:
        """``s = h Aᵀ``."""
        return low_rank.shrink(h, A)

    def logits(
        self,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        s: Tensor | None,
        lora: LoRA | None,
    ) -> Tensor:
        """``h Wᵀ + bias + scale · s Bᵀ``, ``[C, V]``."""
        z = _logits(h, weight, bias)
        return z if lora is None or s is None else low_rank.expand_(z, s, lora.B, lora.scale)

    def row_losses_(
        self,
        z: Tensor,
        target: Tensor,
        row_loss: RowLoss,
        *,
        vocabulary: int,
        ignored: Tensor | None,
        factor: Tensor | None,
        want_grad: bool,
    ) -> Tensor:
        """The loss of each row; with ``want_grad`` the gradient, multiplied by ``factor``, is written over the logits."""
        del vocabulary  # z has no other columns
        losses, _ = xent_rows_(z, target, row_loss, ignored=ignored, want_grad=want_grad)
        if want_grad and factor is not None:
            z.mul_(factor[:, None].to(z.dtype))
        return losses

    def grads_at_output(
        self, dz: Tensor, s: Tensor, lora: LoRA, dB: Tensor | None, needs_ds: bool
    ) -> Tensor | None:
        """Add the chunk's part to ``dB``, and return ``ds = scale · dz B`` if needed."""
        if dB is not None:
            add_tall_(dB, dz, s, lora.scale)
        return low_rank.grad_s(dz, lora.B, lora.scale) if needs_ds else None

    def add_grad_a_(self, dA: Tensor, ds: Tensor, h: Tensor) -> None:
        """Add ``dsᵀ h`` to ``dA``."""
        add_tall_(dA, ds, h, 1.0)

    def write_grad_hidden(
        self, out: Tensor, dz: Tensor, weight: Tensor, ds: Tensor | None, lora: LoRA | None
    ) -> None:
        """Fill ``out = dz W + ds A``."""
        dh = hidden_grad(dz, weight)
        if lora is not None and ds is not None:
            low_rank.expand_grad_(dh, ds, lora.A)
        out.copy_(dh)

    def scaled(self, dhidden: Tensor, factor: Tensor, places: Tensor | None) -> Tensor:
        """``factor · dhidden``; ``factor`` is one number, or one for each row of the call, of which ``dhidden`` has ``places``."""
        if factor.dim():
            factor = (factor if places is None else factor[places])[:, None].to(dhidden.dtype)
        return dhidden * factor


def xent_rows_(
    z: Tensor, target: Tensor, row_loss: RowLoss, *, ignored: Tensor | None, want_grad: bool
) -> tuple[Tensor, Tensor]:
    """One pass over a chunk of raw logits: the loss of each row; the gradient is written over ``z``.

    Args:
        z: ``[C, V]``. It is overwritten by ``dloss/dz``; without ``want_grad`` its values afterwards have no meaning.
        target: ``Int64[C]`` in [0, V), also for ignored rows.
        row_loss: The loss of one row.
        ignored: ``Bool[C]``, true for rows whose loss and gradient are 0; ``None`` if there are none.
        want_grad: Whether the gradient is needed.

    Returns:
        ``(loss, lse)``, both ``[C]`` and float32 (float64 for float64).
    """
    if z.dtype.itemsize >= 4:
        return _xent_wide_rows_(z, target, row_loss, ignored, want_grad)
    loss, lse = z.new_empty(2, z.shape[0], dtype=torch.float32)
    for rows in tiles(z.shape[0], z.shape[1]):
        y = z[rows].float()
        skip = None if ignored is None else ignored[rows]
        loss[rows], lse[rows] = _xent_wide_rows_(y, target[rows], row_loss, skip, want_grad)
        if want_grad:
            z[rows] = y
    return loss, lse


def _xent_wide_rows_(
    z: Tensor, target: Tensor, row_loss: RowLoss, ignored: Tensor | None, want_grad: bool
) -> tuple[Tensor, Tensor]:
    """``xent_rows_`` for float32 and float64."""
    cap, smoothing, index = row_loss.softcap, row_loss.label_smoothing, target[:, None]
    slope = None
    if row_loss.logit_scale != 1.0:
        z.mul_(row_loss.logit_scale)
    if cap is None and native.supports(z):
        counted = target if ignored is None else target.masked_fill(ignored, -1)
        return native.cross_entropy_(z, counted, smoothing, row_loss.z_loss, row_loss.logit_scale)
    if cap is not None:
        z.div_(cap).tanh_()
        slope = 1 - z * z if want_grad else None
        z.mul_(cap)

    loss = z.gather(1, index).squeeze(1).mul_(smoothing - 1)
    if smoothing:
        loss.sub_(z.mean(1), alpha=smoothing)
    top = z.amax(1)
    torch.softmax(z, 1, out=z)
    # lse from the largest probability, which is at least 1 / V: its logarithm is always finite, that of the target may not be
    lse = top - z.amax(1).log_()
    loss.add_(lse)
    if row_loss.z_loss:
        loss.add_(lse.square(), alpha=row_loss.z_loss)
    if ignored is not None:
        loss.masked_fill_(ignored, 0.0)
    if not want_grad:
        return loss, lse

    if row_loss.z_loss:
        z.mul_((1 + 2 * row_loss.z_loss * lse)[:, None])
    if smoothing:
        z.sub_(smoothing / z.shape[1])
    z.scatter_(1, index, z.gather(1, index).sub_(1 - smoothing))
    if slope is not None:
        z.mul_(slope)
    if row_loss.logit_scale != 1.0:
        z.mul_(row_loss.logit_scale)
    if ignored is not None:
        z.masked_fill_(ignored[:, None], 0.0)
    return loss, lse


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``h Wᵀ + bias`` in the dtype of ``h``; a weight of another dtype is cast a tile at a time."""
    if weight.dtype == h.dtype:
        return _linear(h, weight, bias)
    z = h.new_empty(h.shape[0], weight.shape[0])
    for tile in tiles(*weight.shape):
        z[:, tile] = _linear(h, weight[tile].to(h.dtype), None if bias is None else bias[tile])
    return z


def _linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return matmul_nt(h, weight)
    bias = bias.to(h.dtype)
    if h.dtype.itemsize < 4:
        # F.linear adds the bias inside the product and rounds once; adding it afterwards would round twice
        return torch.nn.functional.linear(h, weight, bias)
    return matmul_nt(h, weight).add_(bias)


def hidden_grad(dz: Tensor, weight: Tensor) -> Tensor:
    """``dz W`` in the dtype of ``dz``; a weight of another dtype is cast a tile at a time."""
    if weight.dtype == dz.dtype:
        return matmul_nn(dz, weight)
    dh = dz.new_zeros(dz.shape[0], weight.shape[1], dtype=wide_dtype(dz.dtype))
    for tile in tiles(*weight.shape):
        dh.add_(matmul_nn(dz[:, tile], weight[tile].to(dz.dtype)))
    return dh.to(dz.dtype)


def add_tall_(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """``total += scale · leftᵀ right`` in the dtype of ``total``; columns of a 16-bit ``left`` are cast a tile at a time."""
    right = right.to(total.dtype)
    if left.dtype == total.dtype:
        total.addmm_(left.t(), right, alpha=scale)
        return
    for tile in tiles(left.shape[1], left.shape[0]):
        total[tile].addmm_(left[:, tile].to(total.dtype).t(), right, alpha=scale)


def tiles(rows: int, columns: int) -> Iterator[slice]:
    """Slices of ``rows``; each has at most ``_TILE_BYTES`` of float32 numbers, with ``columns`` numbers in each row."""
    step = max(_TILE_BYTES // (4 * max(columns, 1)), 1)
    for start in starts(rows, step):
        yield slice(start, start + step)
