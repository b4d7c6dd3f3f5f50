"""One decision a module: what a forward runs, or the reason why the module's own code runs.

Every fused module has a ``peftkit_plan(x)``. Its forward calls it with the input it got; ``explain`` and ``strict=True`` call it
with an example of that input. Nothing else decides, so the report and the forward cannot disagree.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_DECLINED = "_peftkit_declined"


class Reason(str):
    """Why a module runs its own forward, as a sentence for the report; what a plan returns instead of parts."""

    __slots__ = ()


class NotReached(Reason):
    """The reason of a layer in which no active adapter has weights: its own forward only runs its base layer."""

    __slots__ = ()


class Fused(nn.Module):
    """Base of everything that is mixed into a module's own class (``peftkit.swap``) and gives it a fused forward."""

    peftkit_method: str
    """What ``explain`` calls it."""

    def peftkit_plan(self, x: Tensor) -> Any:
        """What a forward on ``x`` runs in the present state, or the ``Reason`` why the module's own forward runs."""
        raise NotImplementedError

    def peftkit_example(self) -> Tensor:
        """A small input such as the module gets in its model, for asking for a plan without a forward."""
        raise NotImplementedError

    def peftkit_backend(self, x: Tensor, parts: Any) -> str:
        """The backend on which these parts of a plan for ``x`` run: ``"torch"`` or ``"triton"``."""
        raise NotImplementedError

    def peftkit_verdict(self) -> tuple[str, str]:
        """The path a forward takes in the present state, for ``explain``, and the reason if it is the module's own."""
        x = self.peftkit_example()
        parts = self.peftkit_plan(x)
        if isinstance(parts, Reason):
            return "peft", parts
        return f"fused:{self.peftkit_backend(x, parts)}", ""


def decline(module: nn.Module, method: str, reason: str) -> None:
    """Keep on a module why it was looked at and not fused; ``explain`` shows it."""
    module.__dict__[_DECLINED] = (method, str(reason))


def declined(module: nn.Module) -> tuple[str, str] | None:
    """The method and reason given to ``decline``, or ``None``."""
    return module.__dict__.get(_DECLINED)


def forget_declined(module: nn.Module) -> None:
    """Undo ``decline``."""
    module.__dict__.pop(_DECLINED, None)
