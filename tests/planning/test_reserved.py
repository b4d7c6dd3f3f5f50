"""The allocator's rules on sequences small enough to follow by hand."""

from peftkit.planning.ledger import Block, Event
from peftkit.planning.reserved import reserved_bytes

MIB = 2**20


def block(size):
    return Block(size, "", "")


def events(*changes):
    return [Event(b, size if sign else -size, "", "") for b, size, sign in changes]


def test_small_requests_share_a_segment_and_large_ones_are_rounded():
    assert reserved_bytes([block(1)], []) == 2 * MIB
    assert reserved_bytes([block(512)] * 1 + [block(MIB) for _ in range(2)], []) == 4 * MIB
    assert reserved_bytes([block(MIB + 1)], []) == 20 * MIB
    assert reserved_bytes([block(11 * MIB)], []) == 12 * MIB


def test_freed_memory_is_used_again_and_neighbours_are_joined():
    a, b, c = block(9 * MIB), block(9 * MIB), block(18 * MIB)
    freed = events((a, a.size, 0), (b, b.size, 0))
    d, e = block(9 * MIB), block(9 * MIB)
    again = events((d, d.size, 1), (e, e.size, 1))
    assert reserved_bytes([a, b], freed + again) == 20 * MIB
    assert reserved_bytes([a, b], freed + events((c, c.size, 1))) == 20 * MIB
    only_one = events((a, a.size, 0), (c, c.size, 1))
    assert reserved_bytes([a, b], only_one) == 38 * MIB
