"""What torch's CUDA allocator takes from the device for a sequence of allocations: its rules, replayed.

Memory is taken in segments. A request is rounded, put into the smallest free piece that is large enough, and the rest of the piece
stays free. Freed neighbours become one piece again. Segments are kept.

Source: ``c10/cuda/CUDACachingAllocator.cpp`` in torch, default settings.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

from peftkit.planning.ledger import Block, Event

_ROUND = 512
_SMALL = 2**20
"""Requests up to this size share segments of 2 MiB."""
_SMALL_SEGMENT = 2**21
_MEDIUM = 10 * 2**20
"""Requests below this size share segments of 20 MiB; larger ones get their own, a multiple of 2 MiB."""
_MEDIUM_SEGMENT = 20 * 2**20


class _Piece:
    """A part of a segment; ``before`` and ``after`` are its neighbours. ``address`` decides among free pieces of one size."""

    __slots__ = ("address", "after", "before", "free", "size")

    def __init__(self, size: int, address: int):
        self.size, self.address = size, address
        self.before: _Piece | None = None
        self.after: _Piece | None = None
        self.free = False


class _Pool:
    """The segments for small requests, or those for others."""

    def __init__(self, smallest_rest: int):
        self.taken = 0
        self._smallest_rest = smallest_rest
        self._free: list[tuple[int, int, _Piece]] = []

    def take(self, size: int, segment: int) -> _Piece:
        """A piece for ``size`` bytes, from a new segment of ``segment`` bytes if no free piece is large enough."""
        place = bisect_left(self._free, (size, 0), key=lambda entry: entry[:2])
        if place < len(self._free):
            piece = self._free.pop(place)[2]
            piece.free = False
        else:
            piece = _Piece(segment, self.taken)
            self.taken += segment
        if piece.size - size >= self._smallest_rest:
            self._split(piece, size)
        return piece

    def give_back(self, piece: _Piece) -> None:
        """Free a piece and join it with free neighbours."""
        for neighbour in (piece.before, piece.after):
            if neighbour is not None and neighbour.free:
                self._free.pop(
                    bisect_left(
                        self._free, (neighbour.size, neighbour.address), key=lambda entry: entry[:2]
                    )
                )
                piece.size += neighbour.size
                if neighbour is piece.before:
                    piece.before, piece.address = neighbour.before, neighbour.address
                    if piece.before is not None:
                        piece.before.after = piece
                else:
                    piece.after = neighbour.after
                    if piece.after is not None:
                        piece.after.before = piece
        self._add_free(piece)

    def _split(self, piece: _Piece, size: int) -> None:
        rest = _Piece(piece.size - size, piece.address + size)
        rest.before, rest.after = piece, piece.after
        if rest.after is not None:
            rest.after.before = rest
        piece.after, piece.size = rest, size
        self._add_free(rest)

    def _add_free(self, piece: _Piece) -> None:
        piece.free = True
        insort(self._free, (piece.size, piece.address, piece), key=lambda entry: entry[:2])


def reserved_bytes(before: Sequence[Block], events: Iterable[Event]) -> int:
    """The bytes of all segments after ``before`` was allocated and ``events`` happened."""
    small, large = _Pool(_ROUND), _Pool(_SMALL + 1)
    pieces: dict[Block, tuple[_Pool, _Piece]] = {}

    def take(block: Block) -> None:
        size = max(-(-block.size // _ROUND), 1) * _ROUND
        if size <= _SMALL:
            pieces[block] = small, small.take(size, _SMALL_SEGMENT)
        else:
            own = -(-size // _SMALL_SEGMENT) * _SMALL_SEGMENT
            pieces[block] = large, large.take(size, _MEDIUM_SEGMENT if size < _MEDIUM else own)

    for block in before:
        take(block)
    for event in events:
        if event.change > 0:
            take(event.block)
        elif event.block in pieces:
            pool, piece = pieces.pop(event.block)
            pool.give_back(piece)
    return small.taken + large.taken
