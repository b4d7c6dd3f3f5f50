"""A weight stored in eight bits."""

from __future__ import annotations

import struct
from collections.abc import Sequence
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


MAX_WIDTH = (2**31 - 1) // 127**2
"""The largest number of products of two codes whose sum fits 32 bits."""


@dataclass(frozen=True, slots=True)
class Int8ComputeWeight(Int8Weight):
    """An 8-bit weight that is multiplied in 8 bits, as in LLM.int8(): the op quantises the rows of its input in the call.

    Attributes:
        threshold: Columns of the input in which some magnitude reaches it are multiplied in the dtype of the input; ``None``
            quantises all columns.
        backward_in_8_bits: Whether the gradient of the input is also a product in 8 bits, of the quantised rows of ``dy ∘ sw``.
            Otherwise it is a product with the decoded weight, in the dtype of the gradient, as in bitsandbytes.

    Raises:
        ValueError: Shapes or dtypes do not fit, the threshold is not positive, or the weight is too wide for exact sums.

    Source: Dettmers et al., 2022, arXiv:2208.07339, section 3.
    """

    threshold: float | None = None
    backward_in_8_bits: bool = False

    def __post_init__(self) -> None:
        Int8Weight.__post_init__(self)
        if self.threshold is not None and not self.threshold > 0.0:
            raise ValueError(
                f"threshold={self.threshold} makes every column an outlier; pass a positive value or None"
            )
        summed = self.shape if self.backward_in_8_bits else self.shape[1:]
        if max(summed) > MAX_WIDTH:
            raise ValueError(
                f"codes has shape {self.shape}; sums of more than {MAX_WIDTH} products overflow 32 bits; use Int8Weight"
            )

    def layout(self) -> list[int]:
        """The numbers that ``rebuild`` needs besides ``tensors``: the bits of the threshold (0 for none), whether the backward is in
        8 bits, ``N`` and ``K``.
        """
        bits = struct.unpack("<q", struct.pack("<d", self.threshold or 0.0))[0]
        return [bits, int(self.backward_in_8_bits), *self.shape]

    @classmethod
    def rebuild(cls, tensors: Sequence[Tensor], layout: Sequence[int]) -> Int8ComputeWeight:
        """The weight, from its ``tensors`` and ``layout``."""
        threshold = struct.unpack("<d", struct.pack("<q", layout[0]))[0]
        return cls(*tensors, threshold or None, bool(layout[1]))
