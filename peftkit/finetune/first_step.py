"""One forward and backward before training: does everything that is trained get a finite gradient?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from peftkit.checks import check
from peftkit.checks.reach import loss_of as model_loss
from peftkit.checks.reach import undisturbed
from peftkit.errors import ContractError, count, listing


def check_first_step(
    model: nn.Module,
    batch: Mapping[str, Any],
    is_adapter: bool,
    loss_of: Callable[[nn.Module, Any], Any] | None,
) -> list[str]:
    """Raise if training would fail silently; return notes.

    Args:
        model: The prepared model. Weights of the model itself that get no gradient are frozen, with a note.
        batch: The first batch.
        is_adapter: Whether an adapter is trained, for which ``peftkit.check`` has more to say.
        loss_of: The task's own loss, or ``None`` if the model computes it.

    Raises:
        ContractError: The loss or a gradient is not finite, or an adapter gets no gradient.
    """
    if is_adapter and loss_of is None:
        found = check(model, batch)
        return [f"loss before training {found.loss:.4g}", *found.notes]
    notes = list(check(model).notes) if is_adapter else []
    device = next(model.parameters()).device
    inputs = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
    with undisturbed(model):
        loss = model_loss(model, inputs) if loss_of is None else loss_of(model, inputs)
        if not bool(torch.isfinite(loss)):
            raise ContractError(
                f"the loss of the first batch is {loss.item()} before any step; check the data and the model's weights, and use "
                "training.precision=fp32"
            )
        loss.backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        missing = [n for n, p in trained.items() if p.grad is None]
        broken = [
            n
            for n, p in trained.items()
            if p.grad is not None and not bool(p.grad.isfinite().all())
        ]
    if broken:
        raise ContractError(
            f"{count(len(broken), 'gradient is', 'gradients are')} not finite in the first step:\n{listing(broken)}\n"
            "Use training.precision=fp32, or look for a division by zero in the model."
        )
    if len(missing) == len(trained) or (missing and is_adapter):
        raise ContractError(
            f"{count(len(missing), 'trained tensor gets', 'trained tensors get')} no gradient from the first batch:\n{listing(missing)}\n"
            "Choose other modules in the strategy."
        )
    for name in missing:
        trained[name].requires_grad_(False)
    if missing:
        notes.append(
            f"frozen, because the loss does not depend on them: {', '.join(missing[:4])}"
            + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        )
    return [f"loss before training {loss.item():.4g}", *notes]
