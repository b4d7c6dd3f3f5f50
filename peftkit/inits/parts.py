"""Low-rank parts of a weight: what the factors of an adapter start with.

Each function returns ``A [R, K]`` and ``B [N, R]``, of which ``scale · B A`` is subtracted from the weight.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

_OVERSAMPLED = 10
_SEED = 0

Factors = tuple[Tensor, Tensor]


def iterations_of(init: str) -> int | None:
    """The number after ``"pissa_niter_"``, or ``None`` if ``init`` is another word."""
    found = re.fullmatch(r"pissa_niter_(\d+)", init)
    return int(found[1]) if found else None


def principal_part(weight: Tensor, rank: int, scale: float, iterations: int | None) -> Factors:
    """The best approximation of this rank, with its singular values shared by both factors: ``A = √(S/scale) Vᵀ``, ``B = U √(S/scale)``.

    Args:
        weight: ``Float32[N, K]``.
        rank: ``R``.
        scale: The factor of the adapter.
        iterations: Power iterations of a randomised decomposition, or ``None`` for the exact one. The random numbers are always the same.

    Source: Meng et al., 2024, arXiv:2404.02948; Halko et al., 2011, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    if iterations is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        width = min(rank + _OVERSAMPLED, *weight.shape)
        generator = torch.Generator().manual_seed(_SEED)
        sample = torch.randn(weight.shape[1], width, generator=generator).to(weight)
        Q = torch.linalg.qr(weight @ sample).Q
        for _ in range(iterations):
            Q = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ Q).Q).Q
        U, S, Vh = torch.linalg.svd(Q.T @ weight, full_matrices=False)
        U = Q @ U
    root = (S[:rank] / scale).sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def orthonormal_part(weight: Tensor, rank: int) -> Factors:
    """The first columns of ``Q`` and rows of ``R`` of the weight's QR decomposition, as PEFT takes them: ``scale · B A`` is ``scale`` times
    the part.

    Args:
        weight: ``Float32[N, K]``.
        rank: ``R``.

    Source: Büyükakyüz, 2024, arXiv:2406.01775.
    """
    Q, R = torch.linalg.qr(weight)
    return R[:rank].contiguous(), Q[:, :rank].contiguous()
