"""How messages count and list."""

from peftkit.errors import count, listing


def test_a_count_agrees_with_its_noun():
    assert count(1, "tensor") == "1 tensor"
    assert count(0, "tensor") == "0 tensors"
    assert count(2, "entry", "entries") == "2 entries"
    assert count(1, "entry", "entries") == "1 entry"


def test_a_listing_shows_the_first_and_counts_the_rest():
    assert listing(["a", "b"]) == "  a\n  b"
    assert listing(list("abcdefg"), shown=2) == "  a\n  b\n  ... and 5 more"
