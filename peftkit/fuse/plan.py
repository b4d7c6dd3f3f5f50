"""One decision per module: what a forward runs, or the reason why the module's own code runs.

Every fused module has a method ``peftkit_plan(x)``. The forward calls ``peftkit_plan`` with its input; ``explain`` and ``strict=True``
call it with an example input. No other code decides, so the report always matches the forward.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_DECLINED = "_peftkit_declined"


class Reason(str):
    """Why a module runs its own forward, as a sentence for the report. A plan returns a reason or the parts to compute with."""

    __slots__ = ()


class NotReached(Reason):
    """The reason for a layer in which no active adapter has weights. Its own forward only runs the base layer."""

    __slots__ = ()


class Fused(nn.Module):
    """Base of the classes that are mixed into a module's own class (``peftkit.swap``) to give it a fused forward."""

    peftkit_method: str
    """The name of the method in the report of ``explain``."""

    def peftkit_plan(self, x: Tensor) -> Any:
        """What a forward on ``x`` runs in the current state, or the ``Reason`` why the module's own forward runs."""
        raise NotImplementedError

    def peftkit_example(self) -> Tensor:
        """A small input like those the module gets in its model, to make a plan without a forward."""
        raise NotImplementedError

    def peftkit_backend(self, x: Tensor, parts: Any) -> str:
        """The backend on which these parts of a plan for ``x`` run: ``"torch"`` or ``"triton"``."""
        raise NotImplementedError

    def peftkit_verdict(self) -> tuple[str, str]:
        """For ``explain``: the path of a forward in the current state, and the reason if the module's own forward runs."""
        x = self.peftkit_example()
        parts = self.peftkit_plan(x)
        if isinstance(parts, Reason):
            return "peft", parts
        return f"fused:{self.peftkit_backend(x, parts)}", ""


def decline(module: nn.Module, method: str, reason: str) -> None:
    """Keep on a module the reason why it was examined and not fused; ``explain`` shows the reason."""
    module.__dict__[_DECLINED] = (method, str(reason))


def declined(module: nn.Module) -> tuple[str, str] | None:
    """The method and reason given to ``decline``, or ``None``."""
    return module.__dict__.get(_DECLINED)


def forget_declined(module: nn.Module) -> None:
    """Undo ``decline``."""
    module.__dict__.pop(_DECLINED, None)
