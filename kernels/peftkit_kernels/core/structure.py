"""Arguments and results of schedules as flat lists of tensors, and back.

A schedule takes and returns named tuples of tensors, adapters, stored weights, dtypes and numbers. Autograd, launch plans and
torch.library take lists of tensors. ``flatten`` parts a value into its tensors, its seeds, and a structure: everything else about
it. ``build`` puts a value of that structure together again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Slot(int):
    """A tensor's place in a flat list, instead of the tensor: ``flatten`` treats it as one."""


class SeedSlot(int):
    """A seed's place in a flat list."""


class Structure:
    """All of a value but its tensors and seeds. There is one instance for equal values, so that it is a fast key of a dict.

    Attributes:
        value: Nested tuples. A class is followed by its members, or, if it has a ``Codec``, by the numbers of its tensors and
            seeds and by the rest. ``...`` stands for a tensor.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    @classmethod
    def of(cls, value: Any) -> Structure:
        """The instance of this value."""
        found = _structures.get(value)
        if found is None:
            if len(_structures) >= MAX_STRUCTURES:
                _structures.clear()
            found = _structures.setdefault(value, cls(value))
        return found


MAX_STRUCTURES = 4096
"""Structures that are remembered. A factor that changes in every step would otherwise fill memory."""
_structures: dict[Any, Structure] = {}


class Flat(NamedTuple):
    """A value in parts.

    Attributes:
        tensors: Its tensors, without gaps.
        seeds: The seeds of its dropout masks.
        structure: The rest: classes, numbers, and where there is no tensor.
    """

    tensors: list[Any]
    seeds: list[Any]
    structure: Structure


class Codec(NamedTuple):
    """How a class is parted.

    Attributes:
        part: Its tensors, its seeds, and a hashable value that holds the rest.
        build: The instance, from these three.
        takes_slots: Whether ``build`` works for slots instead of tensors.
    """

    part: Callable[[Any], tuple[Sequence[Any], Sequence[Any], Any]]
    build: Callable[[Sequence[Any], Sequence[Any], Any], Any]
    takes_slots: bool = True


class _Unbuilt(NamedTuple):
    """Stands for an instance of a class whose ``build`` takes no slots."""

    kind: type
    tensors: list[Any]
    rest: Any


_codecs: dict[type, Codec] = {}
_classes: dict[str, type] = {"builtins.list": list, "builtins.tuple": tuple}
_TENSOR = ...
"""Stands for a tensor in a structure."""
_TENSORS = frozenset((Tensor, torch.nn.Parameter, Slot))
_NUMBERS = frozenset((type(None), bool, int, float, str, torch.dtype))


def register(kind: type, codec: Codec) -> None:
    """Let values contain instances of ``kind``."""
    _codecs[kind] = codec
    register_tuples(kind)


def register_tuples(*kinds: type) -> None:
    """Let ``decode`` find these named tuples by name."""
    for kind in kinds:
        _classes[_name(kind)] = kind


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def flatten(value: Any) -> Flat:
    """The parts of ``value``."""
    tensors: list[Any] = []
    seeds: list[Any] = []
    return Flat(tensors, seeds, Structure.of(_part(value, tensors, seeds)))


def _part(value: Any, tensors: list[Any], seeds: list[Any]) -> Any:
    kind = type(value)
    if kind in _NUMBERS:
        return value
    codec = _codecs.get(kind)
    if codec is not None:
        own, own_seeds, rest = codec.part(value)
        tensors += own
        seeds += own_seeds
        return kind, len(own), len(own_seeds), rest
    if kind is _Unbuilt:
        tensors += value.tensors
        return value.kind, len(value.tensors), 0, value.rest
    if isinstance(value, (Tensor, Slot)):
        tensors.append(value)
        return _TENSOR
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"an operation takes no {kind.__name__}")
    # members of the usual classes are handled here: a call for each of them would double the time
    parts = [kind]
    for member in value:
        own_kind = type(member)
        if own_kind in _TENSORS:
            tensors.append(member)
            parts.append(_TENSOR)
        elif own_kind in _NUMBERS:
            parts.append(member)
        else:
            parts.append(_part(member, tensors, seeds))
    return tuple(parts)


def build(structure: Structure, tensors: Sequence[Any], seeds: Sequence[Any] = ()) -> Any:
    """The value with these parts."""
    return _build(structure.value, iter(tensors), iter(seeds))


def build_slots(structure: Structure, first: int = 0) -> Any:
    """The value with the places ``first``, ``first + 1``, ... instead of tensors, and those of its seeds from 0."""
    return _build(structure.value, map(Slot, count(first)), map(SeedSlot, count()))


def _build(structure: Any, tensors: Iterator[Any], seeds: Iterator[Any]) -> Any:
    if structure is _TENSOR:
        return next(tensors)
    if type(structure) is not tuple:
        return structure
    kind, *members = structure
    codec = _codecs.get(kind)
    if codec is not None:
        own_count, seed_count, rest = members
        own = [next(tensors) for _ in range(own_count)]
        if not codec.takes_slots and own and type(own[0]) is Slot:
            return _Unbuilt(kind, own, rest)
        return codec.build(own, [next(seeds) for _ in range(seed_count)], rest)
    parts = [_build(member, tensors, seeds) for member in members]
    return parts if kind is list else tuple(parts) if kind is tuple else kind(*parts)


def encode(value: Any) -> tuple[list[Any], str, list[float], list[Any]]:
    """``value`` as torch.library takes it: tensors, the structure as a string and its fractional numbers, and seeds."""
    tensors: list[Any] = []
    seeds: list[Any] = []
    words: list[str] = []
    floats: list[float] = []
    _encode(_part(value, tensors, seeds), words, floats)
    return tensors, " ".join(words), floats, seeds


def _encode(structure: Any, words: list[str], floats: list[float]) -> None:
    kind = type(structure)
    if structure is _TENSOR:
        words.append("T")
    elif structure is None:
        words.append("N")
    elif kind is bool:
        words.append("b1" if structure else "b0")
    elif kind is int:
        words.append(f"i{structure}")
    elif kind is str:
        words.append(f"s{structure}")
    elif kind is torch.dtype:
        words.append(f"d{str(structure).removeprefix('torch.')}")
    elif kind is tuple:
        first = structure[0] if structure else None
        if isinstance(first, type):
            words.append(f"({_name(first)} {len(structure) - 1}")
        else:
            words.append(f"[ {len(structure)}")
        for member in structure[1:] if isinstance(first, type) else structure:
            _encode(member, words, floats)
    else:
        words.append("f")
        floats.append(structure)


def decode(text: str, floats: Sequence[float]) -> Structure:
    """The structure from which ``encode`` has made these two."""
    return Structure.of(_decode(iter(text.split(" ")), iter(floats)))


def _decode(words: Iterator[str], floats: Iterator[float]) -> Any:
    word = next(words)
    kind, rest = word[0], word[1:]
    if kind == "(":
        return (_classes[rest], *[_decode(words, floats) for _ in range(int(next(words)))])
    if kind == "[":
        return tuple([_decode(words, floats) for _ in range(int(next(words)))])
    if kind == "f":
        return next(floats)
    return {"T": _TENSOR, "N": None}[kind] if not rest and kind != "s" else _VALUES[kind](rest)


_VALUES: dict[str, Callable[[str], Any]] = {
    "b": lambda w: w == "1",
    "i": int,
    "s": str,
    "d": lambda w: getattr(torch, w),
}
