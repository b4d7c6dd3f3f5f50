"""Find the layers that measure their input in training: batch norms, whose running statistics are buffers.

An adapter file has no buffers of the base model. If a frozen batch norm went on measuring in training, the adapter would be trained
for statistics that are lost when the run ends, and the loaded model would compute something else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

_WHOLE = ("modules_to_save.", "original_module.")
"""Parts of the names of copies that PEFT trains and saves whole, with their buffers, and of what the copies replace."""


class Norm(NamedTuple):
    """A norm with running statistics.

    Attributes:
        name: Its name in the model.
        module: The norm.
        owner: The module whose parameters decide whether it is trained: itself, or its parent if it has no parameters.
    """

    name: str
    module: nn.Module
    owner: nn.Module

    @property
    def is_trained(self) -> bool:
        """Whether every parameter that decides about it is trained."""
        parameters = list(self.owner.parameters())
        return bool(parameters) and all(p.requires_grad for p in parameters)


def norms_with_statistics(model: nn.Module) -> list[Norm]:
    """The batch and instance norms of a model that keep running statistics.

    Args:
        model: A model with or without adapters.
    """
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            alone = next(module.parameters(), None) is None
            found.append(Norm(name, module, modules[name.rpartition(".")[0]] if alone else module))
    return found


def hold_statistics(norms: Iterable[Norm]) -> None:
    """Put the frozen ones in evaluation mode, so that they use their statistics and do not change them.

    Args:
        norms: From ``norms_with_statistics``. ``model.train()`` puts all of them in training mode again.
    """
    for norm in norms:
        if norm.module.training and not norm.is_trained:
            norm.module.eval()


def lost_statistics(model: nn.Module) -> list[str]:
    """The names of frozen norms that change their statistics in the model's current mode."""
    return [
        norm.name
        for norm in norms_with_statistics(model)
        if norm.module.training
        and not norm.is_trained
        and not any(part in norm.name for part in _WHOLE)
    ]
