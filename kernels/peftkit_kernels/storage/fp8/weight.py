"""A weight stored in float8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
"""Four bits of exponent, three of mantissa, no infinity."""

LARGEST = 448.0
"""The largest number of ``DTYPE``."""


@dataclass(frozen=True, slots=True)
class Float8Weight:
    """A frozen linear weight in float8 (e4m3): element ``(n, k)`` is ``codes[n, k] · row_scale[n]``.

    The ops multiply it in float8: they quantise the rows of the input in the call, and in the backward those of the gradient.

    Attributes:
        codes: ``Float8_e4m3fn[N, K]``.
        row_scale: ``Float32[N]``.

    Raises:
        ValueError: Shapes or dtypes do not fit.

    Source: Micikevicius et al., 2022, arXiv:2209.05433.
    """

    codes: Tensor
    row_scale: Tensor

    def __post_init__(self) -> None:
        if self.codes.dtype is not DTYPE or self.codes.dim() != 2:
            raise ValueError(
                f"codes is {self.codes.dtype} {tuple(self.codes.shape)}; it must be float8_e4m3fn [N, K]"
            )
        rows = self.codes.shape[0]
        if self.row_scale.dtype is not torch.float32 or self.row_scale.shape != (rows,):
            raise ValueError(
                f"row_scale is {self.row_scale.dtype} {tuple(self.row_scale.shape)}; it must be float32 ({rows},)"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, K)``."""
        return tuple(self.codes.shape)

    @property
    def device(self) -> torch.device:
        """The device of the weight."""
        return self.codes.device

    def tensors(self) -> list[Tensor]:
        """The stored tensors, as a torch.library op takes them; ``Float8Weight(*tensors)`` is the weight again."""
        return [self.codes, self.row_scale]
