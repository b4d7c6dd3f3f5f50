"""A joint step against a step of each adapter alone: are loss and gradients the same?

A model can mix the rows of a batch, for example in a norm over the batch or by sorting tokens to experts. Then adapters that are trained
together would disturb each other, without any error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from peftkit.checks.reach import loss_of
from peftkit.errors import ContractError
from peftkit.finetune.together.conductor import joined
from peftkit.finetune.together.passes import JointPasses
from peftkit.fuse.int8_mode import outliers_in_8_bits

_NOISE = 0.02
"""Standard deviation of what is added to the adapters for the comparison, because new ones change nothing."""

_ROUNDINGS, _FIRST_DIGIT = 2, 0.5
"""A difference may be so many times that of another rounding of the adapters, but no larger than this."""

_SMALL = 0.01
"""Gradients below this share of the largest one are compared on its scale."""


def require_agreement(
    model: Any,
    batch: Mapping[str, Any],
    own_loss: Callable[[Any, Any], Any] | None,
    number: int,
    passes: JointPasses,
) -> None:
    """Raise unless a joint step has the loss and the gradients of a step of this adapter alone.

    Args:
        model: The ``PeftModel`` of the training.
        batch: Its first batch.
        own_loss: The loss of the task, or ``None`` if the model computes it.
        number: The number of the training, so that no two get the same noise.
        passes: Computes joint steps.

    Raises:
        ContractError: They differ by more than rounding.
    """
    inputs = send_to_device(dict(batch), next(model.parameters()).device)
    tensors = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def step() -> tuple[float, dict[str, Tensor]]:
        loss = loss_of(model, inputs) if own_loss is None else own_loss(model, inputs)
        passes.backward(loss)
        found = {}
        for name, tensor in tensors.items():
            found[name] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            tensor.grad = None
        return loss.item(), found

    was_training = model.training
    eps = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    with _noise(tensors, number), outliers_in_8_bits(model):
        model.eval()
        alone = step()
        with _noise(tensors, number + 1, eps):
            rounded = step()
        with joined():
            together = step()
    model.train(was_training)
    # Sums over a joint batch are formed in another order. That changes half of the digits, or, in a deep model of few digits, as many as
    # another rounding of the adapters does. A mixed batch differs in the first digit.
    allowed = max(eps**0.5, min(_ROUNDINGS * _difference(alone, rounded)[0], _FIRST_DIGIT))
    largest, where = _difference(alone, together)
    if not largest <= allowed:
        raise ContractError(
            f"{where} differs by {largest:.2g} of its size if {type(model.get_base_model()).__name__} computes the rows of several adapters "
            f"in one batch (rounding explains {allowed:.2g}), so its rows are not independent of each other; train the adapters separately"
        )


def _difference(
    alone: tuple[float, dict[str, Tensor]], together: tuple[float, dict[str, Tensor]]
) -> tuple[float, str]:
    """The largest relative difference and where it is."""
    floor = _SMALL * max((g.float().norm().item() for g in alone[1].values()), default=0.0)
    found = [(abs(together[0] - alone[0]) / max(abs(alone[0]), 1e-30), "the loss")]
    for name, gradient in alone[1].items():
        size = max(gradient.float().norm().item(), floor, 1e-30)
        difference = (together[1][name] - gradient).float().norm().item()
        found.append((difference / size, f"the gradient of {name}"))
    return max(found, key=lambda one: float("inf") if one[0] != one[0] else one[0])


@contextmanager
def _noise(
    tensors: Mapping[str, Tensor], number: int, share: float | None = None
) -> Iterator[None]:
    """Add noise to the tensors, ``share`` of each value if it is given, and restore them at the end."""
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    draw = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for tensor in tensors.values():
            noise = torch.randn(tensor.shape, generator=draw).to(tensor)
            tensor += _NOISE * noise if share is None else share * noise * tensor
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(before[name])
