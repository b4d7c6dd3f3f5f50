"""Round a merged weight to the values that a storage has, so that the layer's outputs stay near those of the adapted layer.

A tune is small. Almost every element of ``W + scaling · B A`` is nearer to the stored value of ``W`` than to the next one, so rounding each
element by itself returns mostly to ``W``: in 4 bits everything is lost, in bfloat16 a few percent. What counts is the error of the layer's
outputs, ``‖X (Q - T)ᵀ‖`` for inputs X, the merged weight T and the rounded weight Q. ``round_to_outputs`` visits one column of Q after the
other and gives it the stored values with the smallest error of the outputs, given all other columns (coordinate descent on a quadratic
function). No step increases the error on X, so for these inputs the result is never worse than the start.

X is at most a few hundred rows of a probe batch. Besides the error on X, a small multiple of ``‖Q - T‖²`` is minimised, which keeps Q near T
for other inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from peftkit.base.storage import Storage
from peftkit_kernels.storage.nf4.weight import midpoints

Rounding = Literal["outputs", "nearest"]
ROUNDINGS: tuple[Rounding, ...] = ("outputs", "nearest")

SWEEPS = 2
"""Passes over the columns. Later passes change few values."""

_PANEL = 128
"""Columns whose changes are propagated to the others in one product."""

Nearest = Callable[[Tensor, int], Tensor]
"""Rounds values ``Float32[N]`` of a column to the nearest stored values, given the column's index."""


def quantize_to_outputs(
    base: Storage,
    target: Tensor,
    inputs: Tensor,
    *,
    sweeps: int = SWEEPS,
) -> Storage:
    """``round_to_outputs`` for a quantised storage. It keeps the scales of the base and starts at the nearest levels.

    Args:
        base: The storage of the layer before merging.
        target: ``Float32[N, K]``, the merged weight.
        inputs: ``[..., K]``, inputs of the layer.
        sweeps: Passes over all columns.

    Returns:
        A storage with the scales of ``base``.
    """
    levels, scale = base.levels(), base.scale().clamp(min=torch.finfo(torch.float32).tiny)
    bounds = midpoints(levels)

    def nearest(values: Tensor, column: int) -> Tensor:
        s = scale[:, column]
        return levels[torch.bucketize(values / s, bounds)] * s

    start = levels[torch.bucketize(target / scale, bounds)] * scale
    found = round_to_outputs(start, target, inputs, nearest, sweeps=sweeps)
    return base.with_indices(torch.bucketize(found / scale, bounds))


def cast_to_outputs(
    dtype: torch.dtype,
    target: Tensor,
    inputs: Tensor,
    *,
    sweeps: int = SWEEPS,
) -> Tensor:
    """``round_to_outputs`` for a 16-bit dtype. It starts at the nearest values. Arguments as for ``quantize_to_outputs``."""

    def nearest(values: Tensor, column: int) -> Tensor:
        return values.to(dtype).float()

    start = target.to(dtype).float()
    return round_to_outputs(start, target, inputs, nearest, sweeps=sweeps).to(dtype)


def round_to_outputs(
    start: Tensor,
    target: Tensor,
    inputs: Tensor,
    nearest: Nearest,
    *,
    sweeps: int = SWEEPS,
) -> Tensor:
    """Minimise ``‖X (Q - T)ᵀ‖² / M + ridge · ‖Q - T‖²`` over the stored values Q, column by column.

    Rows of X are scaled to length one, so that a token with huge activations counts as much as any other. The ridge follows from the number of
    rows and how alike they are (``_factor``). If they are too few to tell directions apart, ``start`` is returned.

    Args:
        start: ``Float32[N, K]``, stored values to begin with.
        target: ``Float32[N, K]``, T.
        inputs: ``[..., K]``, X with M rows.
        nearest: Rounds a column to stored values.
        sweeps: Passes over all columns.

    Returns:
        ``Float32[N, K]``, Q.
    """
    found = _factor(inputs)
    if found is None:
        return start
    factor, ridge = found
    weight = start.clone()
    error = weight - target
    at_outputs = error @ factor
    for _ in range(sweeps):
        changed = False
        for first in range(0, weight.shape[1], _PANEL):
            panel = slice(first, first + _PANEL)
            part = factor[panel]
            H = part @ part.T
            H.diagonal().add_(ridge)
            gradient = at_outputs @ part.T + ridge * error[:, panel]
            change = _descend(weight[:, panel], gradient, H, nearest, first)
            if bool(change.any()):
                changed = True
                error[:, panel] += change
                at_outputs.addmm_(change, part)
        if not changed:
            break
    return weight


def _descend(weight: Tensor, gradient: Tensor, H: Tensor, nearest: Nearest, first: int) -> Tensor:
    """Visit each column of a panel once. Changes ``weight`` and ``gradient``; returns what was added to the weight."""
    before = weight.clone()
    for j in range(weight.shape[1]):
        old = weight[:, j]
        new = nearest(old - gradient[:, j] / H[j, j], first + j)
        gradient.addr_(new - old, H[j])
        weight[:, j] = new
    return weight - before


def _factor(inputs: Tensor) -> tuple[Tensor, float] | None:
    """F ``[K, m]`` with ``F Fᵀ = Xᵀ X / M`` and m at most K, and the factor of ``‖Q - T‖²``.

    The rows of X have length one. Their covariance S is an estimate from few tokens. The estimate with the smallest expected error is
    ``(1 - shrinkage) S + shrinkage · mean(eigenvalues) · I``. Source: Ledoit and Wolf, 2004, "A well-conditioned estimator for
    large-dimensional covariance matrices".

    Returns:
        ``None`` if the inputs say nothing about the directions in which errors matter.
    """
    x = inputs.reshape(-1, inputs.shape[-1]).float()
    norms = x.norm(dim=1)
    x = x[norms > 0] / norms[norms > 0, None]
    M, K = x.shape
    if M == 0:
        return None
    S2 = (x.T @ x if K < M else x @ x.T).square().sum().item() / M**2
    spread = S2 - 1 / K
    noise = (1 - S2) / M
    # a single token is known exactly, but it is one of many
    shrinkage = min(1.0, max(noise, 1e-3 / M) / spread) if spread > 0 and M > 1 else 1.0
    if M == 1:
        shrinkage = 0.5
    if shrinkage >= 1 - 1e-6:
        return None
    ridge = shrinkage / (1 - shrinkage) / K
    if M <= K:
        return x.T / M**0.5, ridge
    values, vectors = torch.linalg.eigh(x.T @ x / M)
    return vectors * values.clamp(min=0).sqrt(), ridge
