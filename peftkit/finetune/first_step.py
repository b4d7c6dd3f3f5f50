"""One forward and backward before training: does everything that is trained get a finite gradient?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from peftkit.checks import check
from peftkit.checks.reach import loss_of as model_loss
from peftkit.checks.reach import on_device_of, undisturbed
from peftkit.errors import ContractError, count, listing
from peftkit.find.modules import is_quantised
from peftkit.finetune.divided import train_only, whole

Loss = Callable[[nn.Module, Any], Any]

_CHANGED_IN_PLACE = "is a view and is being modified inplace"


def check_first_step(
    model: nn.Module, batch: Mapping[str, Any], is_adapter: bool, loss_of: Loss | None
) -> list[str]:
    """Raise if training would fail silently; return notes.

    If the model changes the output of a quantised layer in place, which bitsandbytes does not allow, the layer gets a hook that allows it.

    Args:
        model: The prepared model. Weights of the model itself that get no gradient are frozen, with a note.
        batch: The first batch.
        is_adapter: Whether an adapter is trained, for which ``peftkit.check`` has more to say.
        loss_of: The task's own loss, or ``None`` if the model computes it.

    Raises:
        ContractError: The loss or a gradient is not finite, or an adapter gets no gradient.
    """
    try:
        return _check(model, batch, is_adapter, loss_of)
    except RuntimeError as error:
        if _CHANGED_IN_PLACE not in str(error):
            raise
        changed = _changed_in_place(model, on_device_of(model, batch), loss_of or model_loss)
        if not changed:
            raise
        for module in changed:
            module.register_forward_hook(_without_view)
        return _check(model, batch, is_adapter, loss_of)


def _changed_in_place(model: nn.Module, inputs: Any, loss_of: Loss) -> list[nn.Module]:
    """The quantised layers without an adapter whose output the model changes, as Wav2Vec2 does with its padding."""
    kept: list[tuple[nn.Module, torch.Tensor, int]] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept.append((module, output, output._version))

    hooks = []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and is_quantised(weight) and not name.endswith(".base_layer"):
            hooks.append(module.register_forward_hook(keep))
    try:
        with undisturbed(model), torch.no_grad():
            loss_of(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [module for module, output, version in kept if output._version != version]


def _without_view(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    """The same values in the same memory, in a tensor that autograd does not treat as a view."""
    return torch.ops.aten._unsafe_view(output, output.shape)


def _check(
    model: nn.Module, batch: Mapping[str, Any], is_adapter: bool, loss_of: Loss | None
) -> list[str]:
    if is_adapter and loss_of is None:
        found = check(model, batch)
        return [f"loss before training {found.loss:.4g}", *found.notes]
    notes = list(check(model).notes) if is_adapter else []
    inputs = on_device_of(model, batch)
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
            if p.grad is not None and not bool(whole(p.grad).isfinite().all())
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
    if missing:
        train_only(model, trained.keys() - set(missing))
        notes.append(
            f"frozen, because the loss does not depend on them: {', '.join(missing[:4])}"
            + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        )
    return [f"loss before training {loss.item():.4g}", *notes]
