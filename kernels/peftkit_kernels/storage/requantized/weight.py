"""A weight that contains its low-rank update and is quantised again."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.storage.int8 import Int8Weight
from peftkit_kernels.storage.nf4 import NF4Weight
from peftkit_kernels.storage.nf4.weight import check_blocksize

Into = Literal["nf4", "int8"]
INTO: tuple[Into, ...] = get_args(Into)

_BASES = Tensor, NF4Weight, Int8Weight
"""The classes of a base. Their numbers are part of ``layout``."""


@dataclass(frozen=True, slots=True, eq=False)
class RequantizedWeight:
    """``Q(W + scale · B A)``: the weight that is stored after a merge. Q quantises as bitsandbytes does, and decodes again.

    An op multiplies by it and adds no update. It treats Q as the identity in the backward (straight-through): the factors get the
    gradients of LoRA with this weight in place of ``W + scale · B A``.

    Attributes:
        base: ``[N, K]``: a tensor, or a weight stored as ``into`` says.
        A: ``[R, K]``, without gradient. The op gets the gradients of the factors from its adapter.
        B: ``[N, R]``, without gradient.
        scale: Factor on the update.
        into: ``"nf4"``, or ``"int8"`` by rows.
        blocksize: Elements that share a maximum in ``"nf4"``. Rows are whole blocks.

    Raises:
        ValueError: Shapes do not fit, the base has another storage, the factors require gradients, or rows are not whole blocks.

    Source of the straight-through gradient: Bengio et al., 2013, arXiv:1308.3432.
    """

    base: Tensor | NF4Weight | Int8Weight
    A: Tensor
    B: Tensor
    scale: float
    into: Into
    blocksize: int = 64

    def __post_init__(self) -> None:
        if self.into not in INTO:
            raise ValueError(f"into={self.into!r} is unknown; use one of {', '.join(INTO)}")
        (N, K), (R, width), (height, rank) = self.shape, self.A.shape, self.B.shape
        if (height, width, rank) != (N, K, R):
            raise ValueError(
                f"A {tuple(self.A.shape)} and B {tuple(self.B.shape)} do not fit a base {(N, K)}; they must be [R, {K}] and [{N}, R]"
            )
        if self.A.requires_grad or self.B.requires_grad:
            raise ValueError(
                "A or B requires a gradient, which this weight does not give; pass detached factors"
            )
        if isinstance(self.base, NF4Weight if self.into == "int8" else Int8Weight):
            other = "nf4" if self.into == "int8" else "int8"
            raise ValueError(f"into={self.into!r}, but the base is stored as {other}")
        if self.into == "int8":
            return
        check_blocksize(self.blocksize)
        if isinstance(self.base, NF4Weight) and self.base.blocksize != self.blocksize:
            raise ValueError(
                f"blocksize={self.blocksize}, but the base has blocks of {self.base.blocksize}"
            )
        if K % self.blocksize:
            raise ValueError(f"rows of {K} elements are not whole blocks of {self.blocksize}")

    @classmethod
    def merging(
        cls, base: Tensor | NF4Weight | Int8Weight, lora: LoRA, into: Into
    ) -> RequantizedWeight:
        """The weight after ``lora`` is merged into ``base``, with the settings of the base.

        A dense base becomes what bitsandbytes stores by default: blocks of 64 without nested maxima.

        Raises:
            ValueError: The adapter has dropout, or as for the class.
        """
        if lora.p:
            raise ValueError(
                f"lora.p={lora.p}: dropout applies to the input of an adapter alone, and a merged weight has none; use p=0"
            )
        blocksize = base.blocksize if isinstance(base, NF4Weight) else 64
        return cls(base, lora.A.detach(), lora.B.detach(), lora.scale, into, blocksize)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, K)``."""
        return tuple(self.base.shape)

    @property
    def device(self) -> torch.device:
        """The device of the weight."""
        return self.base.device

    def tensors(self) -> list[Tensor]:
        """The stored tensors and the factors, as a torch.library op takes them; ``rebuild`` makes the weight from them."""
        base = [self.base] if isinstance(self.base, Tensor) else self.base.tensors()
        return [self.A, self.B, *base]

    def layout(self) -> list[int]:
        """The numbers that ``rebuild`` needs besides ``tensors``: the bits of the scale, the format, the kind of the base and its layout."""
        bits = struct.unpack("<q", struct.pack("<d", self.scale))[0]
        kind = next(i for i, kind in enumerate(_BASES) if isinstance(self.base, kind))
        own = self.base.layout() if isinstance(self.base, NF4Weight) else list(self.shape)
        return [bits, INTO.index(self.into), self.blocksize, kind, *own]

    @classmethod
    def rebuild(cls, tensors: Sequence[Tensor], layout: Sequence[int]) -> RequantizedWeight:
        """The weight, from its ``tensors`` and ``layout``."""
        A, B, *own = tensors
        bits, into, blocksize, kind, *rest = layout
        base = (
            NF4Weight.rebuild(own, rest)
            if _BASES[kind] is NF4Weight
            else Int8Weight(*own)
            if own[1:]
            else own[0]
        )
        scale = struct.unpack("<d", struct.pack("<q", bits))[0]
        return cls(base, A, B, scale, INTO[into], blocksize)
