"""Suggest names for an entry that matches nothing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from peftkit.find.modules import suffixes


def close_matches(entry: str, names: Iterable[str]) -> str:
    """Return a suggestion of names with as many dotted parts as ``entry``; an empty string if there are no names."""
    names = [name for name in names if name]
    depth = entry.count(".")
    candidates = {suffixes(name)[min(depth, name.count("."))] for name in names}
    close = difflib.get_close_matches(entry, sorted(candidates - {entry}), n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(name) for name in close) + "?"
    return f"; names look like {names[len(names) // 2]!r}" if names else ""
