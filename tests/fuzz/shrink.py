"""Make a failing case simpler: leave out options one by one and shrink what is left, as long as it fails in the same way."""

from collections.abc import Callable, Iterator

from fuzz.build import Case

_KEPT = ("seed", "family", "dtype")
_SIMPLER = {
    "dtype": ("float64", "float32"),
    "family": ("linear", "qkv", "llama"),
    "rows": (1,),
    "length": (1, 2, 17, 33),
    "lora.r": (1,),
    "layers": (1,),
    "steps": (1,),
    "targets": ("one", "some"),
}
"""Values that are simpler than others, the simplest first."""


def shrink(case: Case, fails: Callable[[Case], bool], tries: int = 40) -> Case:
    """The simplest case found that still fails.

    Args:
        case: A case that fails.
        fails: Whether a case fails in the same way.
        tries: How many cases may be tried.
    """
    progress = True
    while progress and tries > 0:
        progress = False
        for simpler in _simpler(case):
            tries -= 1
            if fails(simpler):
                case, progress = simpler, True
                break
            if tries <= 0:
                break
    return case


def _simpler(case: Case) -> Iterator[Case]:
    """Cases one step simpler."""
    for name in sorted(case.keys() - set(_KEPT)):
        yield {key: value for key, value in case.items() if key != name}
    for name, values in _SIMPLER.items():
        if name in case:
            at = values.index(case[name]) if case[name] in values else len(values)
            for value in values[:at]:
                yield case | {name: value}
    corners = case.get("values", [])
    if len(corners) > 1:
        for corner in corners:
            yield case | {"values": [other for other in corners if other != corner]}


def explains(known: Case, case: Case) -> bool:
    """Whether ``case`` has every option of ``known``, a shrunk failure, so that it says nothing new.

    What fails in float64 fails in every dtype.
    """
    free = {"seed", "dtype"} if known.get("dtype") == "float64" else {"seed"}
    return all(case.get(name) == value for name, value in known.items() if name not in free)
