"""Activations that backward recomputes instead of keeping.

A frozen norm keeps its input for its own backward. An op that reads the norm's output, and needs it again for the gradient
of A, can recompute that output from the kept input: this costs no further memory. So the norm tags its output with the
function and the tensors that produce it, and the op saves those tensors instead of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

_TAG = "_peftkit_recompute"

Function = Callable[..., Tensor]


class _Recipe(NamedTuple):
    function: Function
    inputs: tuple[Tensor | None, ...]
    versions: tuple[int, int]
    """Versions of the activation and of its first input. An in-place change of either makes the recipe wrong."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """In a saved activation the recipe becomes an empty value that every ``torch.load`` accepts."""
        return bytearray, ()


def tag(y: Tensor, function: Function, source: Tensor, *others: Tensor | None) -> Tensor:
    """Record on ``y`` that ``function(source, *others)`` returns the same bits; the others are frozen. Returns ``y``."""
    if y.requires_grad:
        setattr(y, _TAG, _Recipe(function, (source, *others), (y._version, source._version)))
    return y


def saved_for(x: Tensor, needed: bool) -> tuple[Function | None, tuple[Tensor | None, ...]]:
    """What an autograd function has to save so that ``restore`` returns ``x`` in backward.

    Args:
        x: The activation.
        needed: False if backward does not use ``x``; nothing is saved then.

    Returns:
        The function that recomputes ``x``, or ``None`` if ``x`` itself is saved; and the tensors to save.
    """
    if not needed:
        return None, ()
    recipe = getattr(x, _TAG, None)
    if not isinstance(recipe, _Recipe) or recipe.versions != (
        x._version,
        recipe.inputs[0]._version,
    ):
        return None, (x,)
    if any(t is not None and _is_freed(t) for t in recipe.inputs[1:]):
        return None, (x,)
    return recipe.function, recipe.inputs


def _is_freed(t: Tensor) -> bool:
    """Whether a weight has no memory. FSDP frees the weights of a block after its forward, and they return later than ``x`` is needed."""
    return not t.untyped_storage().nbytes() and t.numel() > 0


def restore(function: Function | None, tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The activation, from what ``saved_for`` returned. ``None`` if backward does not need it."""
    if function is not None:
        return function(*tensors)
    return tensors[0] if tensors else None
