"""What every strategy has: options, default learning rates, and the function that prepares a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from peftkit.finetune.schema import build

if TYPE_CHECKING:
    from peftkit.finetune.recipe import Recipe

FULL_LR = 2e-5
ADAPTER_LR = 10 * FULL_LR
HEAD_LR = 1e-3

Stages = Callable[[int, int], list[tuple[int, set[str]]]]
"""From the number of all steps and of those of an epoch: first step of each stage and the names of the parameters it trains."""


@dataclass(frozen=True)
class Prepared:
    """A model that is ready for training.

    Attributes:
        model: The model. Every parameter that is ever trained has ``requires_grad``.
        stages: What is trained when, or ``None`` if this never changes.
    """

    model: nn.Module
    stages: Stages | None = None


@dataclass(frozen=True)
class AdapterSetting:
    """What the task says about adapters.

    Attributes:
        task_type: PEFT's name of the kind of task.
        outside_loss: Modules that get no adapter, because the loss does not depend on them.
    """

    task_type: str | None = None
    outside_loss: tuple[str, ...] = ()


def train_all(model: nn.Module) -> set[str]:
    """Train every weight but those that the model's class or the task keeps fixed, such as the sinusoidal positions of Whisper's encoder.

    Returns:
        The names of the trained parameters.
    """
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not names:
        model.requires_grad_(True)
        names = {name for name, _ in model.named_parameters()}
    return names


@dataclass
class NoOptions:
    """Options of a strategy or task without options."""


class Strategy:
    """One way to choose what is trained.

    Attributes:
        name: The name in recipes.
        summary: One line for the documentation.
        Options: A dataclass of its options.
        is_adapter: Whether the base model stays frozen and an adapter is saved.
        lr: Learning rate if the recipe has none.
        head_lr: Learning rate of a new task head.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[Any] = NoOptions
    is_adapter: ClassVar[bool] = False
    lr: ClassVar[float] = FULL_LR
    head_lr: ClassVar[float] = 10 * FULL_LR

    @classmethod
    def options(cls, values: Any, where: str) -> Any:
        """Build the options from a mapping; raises ``ContractError`` for a wrong key or value."""
        return build(cls.Options, values, where)

    @classmethod
    def check(cls, options: Any, recipe: Recipe) -> None:
        """Raise ``ContractError`` if the options contradict each other or the rest of the recipe."""

    @classmethod
    def apply(cls, model: nn.Module, options: Any, setting: AdapterSetting) -> Prepared:
        """Prepare a model in place."""
        raise NotImplementedError
