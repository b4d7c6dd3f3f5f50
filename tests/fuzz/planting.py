"""A fault planted into a fused op, for the tests of the fuzzer."""

from fuzz import counting


def plant(monkeypatch, op, change):
    """Replace an op wherever it is called by ``change`` of it."""
    places = [place for place in counting.bindings() if place[2] == op]
    assert places, f"nothing calls {op}"
    for module, attribute, _ in places:
        monkeypatch.setattr(module, attribute, change(getattr(module, attribute)))
