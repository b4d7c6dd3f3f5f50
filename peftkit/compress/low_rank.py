"""The best approximation of ``B A`` with a smaller rank, without the product: from the QR factors of ``B`` and ``Aᵀ``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Truncated(NamedTuple):
    """An update with a smaller rank.

    Attributes:
        A: ``lora_A [r, K]``.
        B: ``lora_B [N, r]``. ``B @ A`` is the update, with a scale of 1.
        energy: The share of ``‖scale · B A‖²`` that is kept, between 0 and 1; 1 if the update is zero.
        error: ``‖scale · B A - B' A'‖ / ‖scale · B A‖`` of the rounded factors; 0 if the update is zero.
    """

    A: Tensor
    B: Tensor
    energy: float
    error: float


class Update:
    """The singular values and vectors of ``scale · B A``, in float64.

    With ``B = Q₁ R₁`` and ``Aᵀ = Q₂ R₂`` they are those of ``scale · R₁ R₂ᵀ [R, R]``, turned by ``Q₁`` and ``Q₂``.

    Attributes:
        rank: The number of singular values, at most ``R``.
    """

    def __init__(self, lora_A: Tensor, lora_B: Tensor, scale: float):
        """Decompose an update.

        Args:
            lora_A: ``[R, K]``.
            lora_B: ``[N, R]``.
            scale: The factor of the product.
        """
        self._A, self._B, self._scale = lora_A.double(), lora_B.double(), scale
        left, upper = torch.linalg.qr(self._B)
        right, lower = torch.linalg.qr(self._A.T)
        u, self._values, vh = torch.linalg.svd(scale * upper @ lower.T, full_matrices=False)
        self._left, self._right = left @ u, vh @ right.T
        self.rank = len(self._values)

    def rank_for(self, energy: float) -> int:
        """The smallest rank of at least 1 that keeps this share of ``‖scale · B A‖²``."""
        kept = self._values.square().cumsum(0)
        if kept[-1] == 0:
            return 1
        # The last sum is compared with itself, so that 1 is reached however it is rounded.
        return int((kept < energy * kept[-1]).sum()) + 1

    def truncated(self, rank: int, dtype: torch.dtype) -> Truncated:
        """Keep the largest singular values.

        Args:
            rank: Their number, at most ``rank`` of the update.
            dtype: The dtype of the new factors. Both have the root of the singular values, so that none is much larger than the other.
        """
        root = self._values[:rank].sqrt()
        lora_A = (root[:, None] * self._right[:rank]).to(dtype)
        lora_B = (self._left[:, :rank] * root).to(dtype)
        squares = self._values.square()
        whole = squares.sum().item()
        if not whole:
            return Truncated(lora_A, lora_B, 1.0, 0.0)
        energy = squares[:rank].sum().item() / whole
        return Truncated(lora_A, lora_B, energy, self._distance(lora_A, lora_B) / whole**0.5)

    def _distance(self, lora_A: Tensor, lora_B: Tensor) -> float:
        """``‖scale · B A - B' A'‖`` from the QR factors of ``[scale · B, -B']`` and ``[A; A']ᵀ``."""
        left = torch.linalg.qr(torch.cat([self._scale * self._B, -lora_B.double()], 1)).R
        right = torch.linalg.qr(torch.cat([self._A, lora_A.double()]).T).R
        return torch.linalg.matrix_norm(left @ right.T).item()
