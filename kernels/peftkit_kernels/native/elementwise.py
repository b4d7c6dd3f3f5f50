"""Element-wise operations, norms, row passes, decoding and 8-bit products in C. Every function expects tensors that ``supports`` accepts."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from peftkit_kernels.native.library import address, call, loaded, run

GATES = ("silu", "gelu_tanh")
"""The activations that have native passes, in the order of the C source. The exact GELU has none: its erf has no vector form
in C, and scalar code is fifty times slower than torch."""

_SUM_ROWS = 64
"""``dora.c`` writes one partial sum for this many rows."""

MAX_RANK = 256
"""The largest rank of ``updated_norm``, which keeps the factors on the stack."""


def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """``act(gate) ∘ up`` for an ``act`` of ``GATES``."""
    h = torch.empty_like(gate)
    call("pk_gate", (gate, up, h), gate.numel(), GATES.index(act))
    return h


def gate_backward(dh: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """``(d_gate, d_up, h)``; ``d_up`` is written into ``dh``."""
    d_gate, h = torch.empty_like(gate), torch.empty_like(gate)
    call("pk_gate_backward", (dh, gate, up, d_gate, h), gate.numel(), GATES.index(act))
    return d_gate, dh, h


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """``(y, rstd)`` for ``x [..., K]``; ``rstd`` is ``[..., 1]``."""
    y, rstd = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1))
    call("pk_rms_norm", (x, weight, y, rstd), rstd.numel(), x.shape[-1], eps, offset)
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    """``dx`` of ``rms_norm``."""
    dx = torch.empty_like(x)
    call("pk_rms_norm_backward", (dy, x, weight, rstd, dx), rstd.numel(), x.shape[-1], offset)
    return dx


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, mean, rstd)`` for ``x [..., K]``; the last two are ``[..., 1]``."""
    y, (mean, rstd) = torch.empty_like(x), x.new_empty(2, *x.shape[:-1], 1)
    call("pk_layer_norm", (x, weight, bias, y, mean, rstd), rstd.numel(), x.shape[-1], eps)
    return y, mean, rstd


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """``dx`` of ``layer_norm``."""
    dx = torch.empty_like(x)
    call("pk_layer_norm_backward", (dy, x, weight, mean, rstd, dx), rstd.numel(), x.shape[-1])
    return dx


def updated_norm(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``|W + scale · B A|`` of every row in one read of ``W [N, K]``; the rank is at most ``MAX_RANK``."""
    norm = weight.new_empty(weight.shape[0])
    call("pk_updated_norm", (weight, A, B, norm), *weight.shape, A.shape[0], scale)
    return norm


def scaled_gate(
    zs: Sequence[Tensor], gs: Sequence[Tensor], biases: Sequence[Tensor], act: str
) -> Tensor:
    """``act(z0 ∘ g0 + b0) ∘ (z1 ∘ g1 + b1)`` for ``zs [M, F]`` and the others ``[F]``; an ``act`` of ``GATES``."""
    h = torch.empty_like(zs[0])
    call("pk_scaled_gate", (*zs, *gs, *biases, h), *h.shape, GATES.index(act))
    return h


def scaled_gate_backward(
    dh: Tensor, zs: Sequence[Tensor], gs: Sequence[Tensor], biases: Sequence[Tensor], act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dz0, dz1, sums)`` of ``scaled_gate``.

    Returns:
        The gradients by the two ``zs``, and ``[4, F]``: summed over the rows, ``d_gate ∘ z0``, ``d_up ∘ z1``, ``d_gate`` and ``d_up``,
        where ``d_gate`` and ``d_up`` are the gradients by the two scaled values.
    """
    d_gate, d_up = torch.empty_like(dh), torch.empty_like(dh)
    partial = dh.new_empty(-(-dh.shape[0] // _SUM_ROWS), 4, dh.shape[1])
    call(
        "pk_scaled_gate_backward",
        (dh, *zs, *gs, *biases, d_gate, d_up, partial),
        *dh.shape,
        GATES.index(act),
    )
    return d_gate, d_up, partial.sum(0)


def scale_backward(dy: Tensor, z: Tensor, g: Tensor, dz: Tensor) -> Tensor:
    """``dz = dy ∘ g`` for ``dy [M, N]`` and ``g [N]``, written; returns ``Σ dy ∘ z`` over the rows, ``[N]``."""
    partial = dy.new_empty(-(-dy.shape[0] // _SUM_ROWS), dy.shape[1])
    call("pk_scale_backward", (dy, z, g, dz, partial), *dy.shape)
    return partial.sum(0)


def cross_entropy_(
    z: Tensor, target: Tensor, smoothing: float, z_loss: float, grad_scale: float
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of every row of ``z [M, V]``, which becomes the gradient times ``grad_scale``.

    Args:
        z: Logits, overwritten.
        target: ``Int64[M]``; a value outside [0, V) gives loss 0 and gradient 0.
        smoothing: Label smoothing in [0, 1).
        z_loss: Weight of the squared log-sum-exp.
        grad_scale: Factor on the gradient.
    """
    loss, lse = z.new_empty(z.shape[0]), z.new_empty(z.shape[0])
    call("pk_cross_entropy", (z, target, loss, lse), *z.shape, smoothing, z_loss, grad_scale)
    return loss, lse


def dropout(x: Tensor, threshold: int, scale: float, seed: int) -> Tensor:
    """``mask ∘ x · scale`` by the rule of ``peftkit_kernels.core.dropout`` for ``x [M, K]``."""
    y = torch.empty_like(x)
    call("pk_dropout", (x, y), *x.shape, threshold, scale, seed)
    return y


def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    row_scale: Tensor | None,
    out: Tensor,
    blocksize: int,
    first_row: int,
) -> None:
    """Rows ``first_row ...`` of an NF4 weight of ``out``'s width, as ``peftkit_kernels.storage.nf4`` defines it, into ``out``.

    Args:
        packed: ``UInt8``, contiguous: two codes in each byte, for the whole weight.
        absmax: ``Float32[blocks]``, contiguous.
        row_scale: ``Float32[N]``, contiguous, or ``None``.
        out: ``Float32[rows, K]`` whose rows are contiguous.
        blocksize: Elements that share one ``absmax``.
        first_row: Row of the weight that ``out`` starts at.
    """
    sizes = *out.shape, out.stride(0), blocksize, first_row
    call("pk_nf4", (packed, absmax, row_scale, out), *sizes)


def quantize_rows(x: Tensor, column_scale: Tensor | None, codes: Tensor) -> Tensor:
    """``codes = round(x ∘ column_scale · 127 / absmax)`` by rows; returns ``absmax``.

    Args:
        x: ``[M, K]``.
        column_scale: ``Float32[K]`` or ``None``.
        codes: ``Int8[M, K]``, contiguous, written.

    Returns:
        ``Float32[M]``, the largest magnitude of each row of ``x ∘ column_scale``.
    """
    absmax = x.new_empty(x.shape[0])
    call("pk_quantize_rows", (x, column_scale, codes, absmax), *x.shape)
    return absmax


def int8_epilogue(
    acc: Tensor,
    row_scale: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    s: Tensor | None,
    t: Tensor | None,
) -> Tensor:
    """``acc ∘ row_scale columnwise ∘ column_scale rowwise + bias + s t`` in one pass.

    Args:
        acc: ``Int32[M, N]``, contiguous.
        row_scale: ``Float32[M]``.
        column_scale: ``Float32[N]`` or ``None``.
        bias: ``Float32[N]`` or ``None``.
        s: ``Float32[M, R]``, contiguous, or ``None``.
        t: ``Float32[R, N]``, contiguous, or ``None``.
    """
    y = row_scale.new_empty(acc.shape)
    rank = 0 if s is None else s.shape[1]
    tensors = acc, row_scale, column_scale, bias, s, t, y
    call("pk_int8_epilogue", tensors, *acc.shape, rank)
    return y


@functools.cache
def has_int8_products() -> bool:
    """Whether ``int8_linear`` uses this processor's vector registers (x86 with AVX2), not plain C."""
    return register_bytes() > 0


def register_bytes() -> int:
    """The bytes of the vector registers that the loaded code uses: 64 with AVX-512, 32 with AVX2, 0 without either."""
    library = loaded()
    return 0 if library is None else library.pk_int8_register_bytes()


def int8_linear(
    codes: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    s: Tensor | None,
    t: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """``(codes weight) ∘ row_scale columnwise ∘ column_scale rowwise + bias + s t``, added to ``out`` if given.

    The sums of the codes are exact and are never stored.

    Args:
        codes: ``Int8[M, K]``, contiguous.
        weight: ``Int8[K, N]``, any strides.
        row_scale: ``Float32[M]``.
        column_scale: ``Float32[N]`` or ``None``.
        bias: ``Float32[N]`` or ``None``.
        s: ``Float32[M, R]``, contiguous, or ``None``.
        t: ``Float32[R, N]``, contiguous, or ``None``.
        out: ``Float32[M, N]``, contiguous, or ``None``.

    Raises:
        MemoryError: There is no memory for the work space.
    """
    (M, K), N = codes.shape, weight.shape[1]
    y = row_scale.new_empty(M, N) if out is None else out
    tensors = codes, weight, row_scale, column_scale, bias, s, t, y
    pointers = [None if tensor is None else address(tensor) for tensor in tensors]
    sizes = M, N, K, 0 if s is None else s.shape[1], *weight.stride()
    run("pk_int8_linear", *pointers, *sizes, out is not None, torch.get_num_threads())
    return y
