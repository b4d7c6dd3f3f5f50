"""One decision a module: what a forward runs, or the reason why the module's own code runs.

Every fused module has a ``peftkit_plan(x)``. Its forward calls it with the input it got; ``explain`` and ``strict=True`` call it
with an example of that input (``peftkit_example``). Nothing else decides, so the report and the forward cannot disagree.
"""

from __future__ import annotations

from torch import nn

_DECLINED = "_peftkit_declined"


class Reason(str):
    """Why a module runs its own forward, as a sentence for the report; what a plan returns instead of parts."""

    __slots__ = ()


def decline(module: nn.Module, method: str, reason: str) -> None:
    """Keep on a module why it was looked at and not fused; ``explain`` shows it."""
    module.__dict__[_DECLINED] = (method, str(reason))


def declined(module: nn.Module) -> tuple[str, str] | None:
    """The method and reason given to ``decline``, or ``None``."""
    return module.__dict__.get(_DECLINED)


def forget_declined(module: nn.Module) -> None:
    """Undo ``decline``."""
    module.__dict__.pop(_DECLINED, None)
