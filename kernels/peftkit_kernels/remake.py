"""Activations that are cheaper to make again than to keep.

A frozen norm keeps its input anyway, so whoever consumes its output (and needs it for dA) need not keep that too: the
norm leaves on its output how to make it again, and the consumer keeps the ingredients, which cost nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

_MARK = "_peftkit_made"

Make = Callable[..., Tensor]


class _Made(NamedTuple):
    make: Make
    ingredients: tuple[Tensor | None, ...]
    versions: tuple[int, int]
    """Of the activation and of its first ingredient: a change of either in place makes this worthless."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """An activation that is saved goes without it: something empty that every ``torch.load`` accepts."""
        return bytearray, ()


def mark(y: Tensor, make: Make, source: Tensor, *others: Tensor | None) -> Tensor:
    """Leave on ``y`` that ``make(source, *others)`` gives the same bits; the others are frozen. Returns ``y``."""
    if y.requires_grad:
        versions = y._version, source._version
        setattr(y, _MARK, _Made(make, (source, *others), versions))
    return y


def kept(x: Tensor, needed: bool) -> tuple[Make | None, tuple[Tensor | None, ...]]:
    """What an autograd function should save to have ``x`` in backward: how to make it, and the tensors.

    Args:
        x: Its input.
        needed: Whether backward needs it at all.
    """
    if not needed:
        return None, ()
    made = getattr(x, _MARK, None)
    if not isinstance(made, _Made) or made.versions != (x._version, made.ingredients[0]._version):
        return None, (x,)
    return made.make, made.ingredients


def again(make: Make | None, tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The activation from what ``kept`` returned, ``None`` where it was not needed."""
    if make is not None:
        return make(*tensors)
    return tensors[0] if tensors else None
