"""Train a pruned model without filling its zeros again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftkit.base.keep import inner_linears
from peftkit.errors import ContractError, count

_ATTRIBUTE = "_peftkit_kept_zeros"


class KeptZeros:
    """The zeros of the trained inner linear layers of a model.

    Their gradients are zero, so that they count neither for an optimiser's averages nor for the norm of all gradients, and they are zero again after
    each step, whatever the optimiser does.

    Attributes:
        masks: For each parameter its name and where it is zero: ``Bool[*shape]``.
    """

    def __init__(self, model: nn.Module):
        """Find the zeros, and mask the gradients.

        Raises:
            ContractError: No trained weight of these layers is zero.
        """
        self.masks: list[tuple[str, nn.Parameter, Tensor]] = []
        for name in inner_linears(model)[0]:
            weight: Any = model.get_submodule(name).weight
            zeros = weight.detach() == 0
            if weight.requires_grad and bool(zeros.any()):
                self.masks.append((f"{name}.weight", weight, zeros))
        if not self.masks:
            raise ContractError(
                f"strategy.keep_zeros=true, but no trained weight of {type(model).__name__} is zero (heads, embeddings and norms do not count); "
                "prune the model first (peftkit prune MODEL OUT --sparsity 0.5), or leave keep_zeros out"
            )
        for _, parameter, zeros in self.masks:
            parameter.register_hook(
                lambda gradient, zeros=zeros: gradient.masked_fill(_on(zeros, gradient), 0)
            )

    def hold(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the weights to zero again after each step of an optimiser."""
        optimizer.register_step_post_hook(lambda *_: self._set())

    @torch.no_grad()
    def _set(self) -> None:
        for _, parameter, zeros in self.masks:
            parameter.masked_fill_(_on(zeros, parameter), 0)

    def judge(self) -> tuple[list[str], list[str]]:
        """Problems and notes after training: are all zeros still there?"""
        lost = [n for n, p, zeros in self.masks if bool(p.detach()[_on(zeros, p)].any())]
        if lost:
            return [
                f"{count(len(lost), 'weight')} lost zeros, such as {lost[0]}; training.optimizer may change weights outside of its step"
            ], []
        total = sum(int(zeros.sum()) for _, _, zeros in self.masks)
        share = total / sum(zeros.numel() for _, _, zeros in self.masks)
        return [], [f"{total:,} zeros kept, {share:.1%} of {count(len(self.masks), 'weight')}"]


def keep_zeros(model: nn.Module) -> None:
    """Keep the zeros of a model while it is trained; as for ``KeptZeros``."""
    model.__dict__[_ATTRIBUTE] = KeptZeros(model)


def kept_zeros(model: nn.Module) -> KeptZeros | None:
    """The zeros that are kept, if any."""
    return model.__dict__.get(_ATTRIBUTE)


def _on(zeros: Tensor, tensor: Tensor) -> Tensor:
    return zeros if zeros.device == tensor.device else zeros.to(tensor.device)
