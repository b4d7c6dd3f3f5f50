"""A weight stored in four bits: the tensors of bitsandbytes' layout, and the tables that decode them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The levels of the sixteen codes. Source: Dettmers et al., 2023, arXiv:2305.14314, appendix E."""

SMALLEST_ABSMAX = 1e-38
"""A block with a smaller maximum is divided by this number: a block of zeros decodes to zeros, and no reciprocal overflows."""


@dataclass(frozen=True, slots=True)
class NestedAbsmax:
    """Decodes block maxima that are stored in 8 bits: ``code[c] · absmax[i // blocksize] + offset``.

    Attributes:
        code: ``Float32[256]``, ascending.
        absmax: ``Float32[ceil(blocks / blocksize)]``.
        offset: ``Float32[]``, the mean of the block maxima.
        blocksize: Block maxima that share one ``absmax``.
    """

    code: Tensor
    absmax: Tensor
    offset: Tensor
    blocksize: int = 256

    def decode(self, codes: Tensor) -> Tensor:
        """``Float32[blocks]``: the block maxima with these ``codes``, ``UInt8[blocks]`` (product and sum each rounded)."""
        absmax = self.absmax.repeat_interleave(self.blocksize)[: codes.numel()]
        return self.code[codes.int()] * absmax + self.offset


@dataclass(frozen=True, slots=True)
class NF4Weight:
    """A frozen weight in four bits: element ``i`` of the flattened weight is ``LEVELS[code] · absmax[i // blocksize]``.

    Attributes:
        packed: ``UInt8[ceil(numel / 2)]`` in any shape: two codes in each byte, the even element in the high nibble.
        absmax: ``Float32[ceil(numel / blocksize)]`` in the unit of the weight; ``UInt8`` if nested.
        shape: The shape of the weight, ``(N, K)`` for a linear. A block may contain elements of several rows.
        blocksize: Elements that share one ``absmax``; a power of two from 32 to 4096.
        nested: Decodes an 8-bit ``absmax``; ``None`` for a float32 one.

    Raises:
        ValueError: The sizes or dtypes do not fit each other.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    blocksize: int = 64
    nested: NestedAbsmax | None = None

    def __post_init__(self) -> None:
        check_blocksize(self.blocksize)
        numel = math.prod(self.shape)
        if self.packed.dtype is not torch.uint8 or self.packed.numel() != (numel + 1) // 2:
            raise ValueError(
                f"packed is {self.packed.dtype} with {self.packed.numel()} elements; a weight {tuple(self.shape)} needs "
                f"{(numel + 1) // 2} elements of uint8 (convert another storage dtype with packed.view(torch.uint8))"
            )
        blocks, dtype = -(-numel // self.blocksize), torch.uint8 if self.nested else torch.float32
        if self.absmax.dtype is not dtype or self.absmax.numel() != blocks:
            raise ValueError(
                f"absmax is {self.absmax.dtype} with {self.absmax.numel()} elements; {blocks} blocks of {self.blocksize} "
                f"need {blocks} elements of {dtype} {'(nested)' if self.nested else '(nested=None)'}"
            )
        if self.nested and self.nested.absmax.numel() != -(-blocks // self.nested.blocksize):
            raise ValueError(
                f"nested.absmax has {self.nested.absmax.numel()} elements; {blocks} block maxima in blocks of "
                f"{self.nested.blocksize} need {-(-blocks // self.nested.blocksize)}"
            )

    @property
    def device(self) -> torch.device:
        """The device of the weight."""
        return self.packed.device

    def tensors(self) -> list[Tensor]:
        """The stored tensors, as a torch.library op takes them; ``rebuild`` makes the weight from them."""
        nested = self.nested
        more = [] if nested is None else [nested.code, nested.absmax, nested.offset]
        return [self.packed, self.absmax, *more]

    def layout(self) -> list[int]:
        """The numbers that ``rebuild`` needs besides ``tensors``."""
        return [self.blocksize, self.nested.blocksize if self.nested else 0, *self.shape]

    @classmethod
    def rebuild(cls, tensors: Sequence[Tensor], layout: Sequence[int]) -> NF4Weight:
        """The weight, from its ``tensors`` and ``layout``."""
        packed, absmax, *more = tensors
        blocksize, nested_blocksize, *shape = layout
        nested = NestedAbsmax(*more, nested_blocksize) if more else None
        return cls(packed, absmax, tuple(shape), blocksize, nested)

    def block_absmax(self) -> Tensor:
        """``Float32[blocks]``: the block maxima, decoded if they are nested."""
        absmax = self.absmax.reshape(-1)
        return absmax if self.nested is None else self.nested.decode(absmax)


def check_blocksize(blocksize: int) -> None:
    """Raise ``ValueError`` unless the layout supports blocks of this size."""
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize={blocksize} is not one of {', '.join(map(str, BLOCKSIZES))}")


def level_table(device: torch.device | str = "cpu") -> Tensor:
    """``Float32[16]``: ``LEVELS`` as a tensor."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


def midpoints(code: Tensor) -> Tensor:
    """The midpoints between neighbouring entries of an ascending table, ``[n - 1]``."""
    return (code[:-1] + code[1:]) / 2


@functools.cache
def dynamic_code() -> Tensor:
    """``Float32[256]``, ascending: the signed 8-bit dynamic map that nested block maxima are stored in.

    It consists of 0, 1 and the midpoints of seven decades of either sign: the decade that ends at ``10**e`` is cut into
    ``2**(e + 6)`` equal parts. Source: Dettmers, 2016, arXiv:1511.04561, section 2.
    """
    positive = []
    for exponent in range(-6, 1):
        edges = torch.linspace(0.1, 1.0, 2 ** (exponent + 6) + 1)
        positive.append(10.0**exponent * ((edges[:-1] + edges[1:]) / 2))
    values = torch.cat(positive)
    return torch.cat([-values, values, torch.tensor([0.0, 1.0])]).sort().values
