"""A weight stored in eight bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A frozen linear weight in eight bits: element ``(n, k)`` is ``codes[n, k] · row_absmax[n] / 127``.

    Attributes:
        codes: ``Int8[N, K]``, from -127 to 127; ``CB`` in bitsandbytes.
        row_absmax: ``Float32[N]``, the largest magnitude of each row; ``SCB`` in bitsandbytes.

    Raises:
        ValueError: Shapes or dtypes do not fit.
    """

    codes: Tensor
    row_absmax: Tensor

    def __post_init__(self) -> None:
        if self.codes.dtype is not torch.int8 or self.codes.dim() != 2:
            raise ValueError(
                f"codes is {self.codes.dtype} {tuple(self.codes.shape)}; it must be int8 [N, K]"
            )
        rows = self.codes.shape[0]
        if self.row_absmax.dtype is not torch.float32 or self.row_absmax.shape != (rows,):
            raise ValueError(
                f"row_absmax is {self.row_absmax.dtype} {tuple(self.row_absmax.shape)}; it must be float32 ({rows},)"
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
        """The stored tensors, as a torch.library op takes them; ``Int8Weight(*tensors)`` is the weight again."""
        return [self.codes, self.row_absmax]

    def row_scale(self) -> Tensor:
        """``Float32[N]``: the weight's change for one step of a code, ``row_absmax / 127``, rounded to float32."""
        return self.row_absmax / 127
