"""The loss of detectors in several processes: that of one process with the rows of all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peftkit.errors import ContractError
from peftkit.finetune.processes import mean_of_all, process_count, tensors_of_all

if TYPE_CHECKING:
    import torch

_DIVIDED_BY_OWN = (
    "ForObjectDetectionLoss",
    "DeformableDetrForObjectDetectionLoss",
    "RTDetrForObjectDetectionLoss",
    "DFineForObjectDetectionLoss",
    "Deimv2ForObjectDetectionLoss",
)
"""transformers' losses that are divided by the number of objects in the rows of a process, if ``counting_own_objects``."""

_DIVIDED_BY_MEAN = ("LwDetrForObjectDetectionLoss",)
"""transformers' losses that are divided by the mean number of objects of all processes."""


def require_known_loss(model: Any) -> None:
    """Raise ``ContractError`` if several processes cannot compute the loss of a detector together.

    Args:
        model: A model of transformers.
    """
    if process_count() == 1:
        return
    name = getattr(model.loss_function, "__name__", repr(model.loss_function))
    known = (*_DIVIDED_BY_OWN, *_DIVIDED_BY_MEAN)
    if name not in known:
        raise ContractError(
            f"the loss of {type(model).__name__}, {name}, divides by numbers of the rows of one process that are not known, so several processes cannot "
            f"compute it together (known are {', '.join(known)}); start the run without torchrun"
        )


@contextmanager
def counting_own_objects() -> Iterator[None]:
    """Transformers' ``ImageLoss`` counts the objects of this process; one process alone does so anyway.

    Otherwise it divides the mean number of all processes by their number, so the terms of boxes are too large by that number
    (transformers 5.10 to 5.23: ``reduce`` of accelerate takes the mean).
    """
    if process_count() == 1:
        yield
        return
    from transformers.loss import loss_for_object_detection

    module: Any = loss_for_object_detection
    before = module.is_accelerate_available
    module.is_accelerate_available = lambda: False
    try:
        yield
    finally:
        module.is_accelerate_available = before


def loss_of_all(model: Any, out: Any, objects: int, rows: int) -> torch.Tensor:
    """The loss of the rows of all processes; the same in all of them.

    ``Deimv2ForObjectDetectionLoss`` divides some terms by the number of its matches, which it does not tell: they count by the number of
    objects, as all others.

    Args:
        model: The detector, without adapters and wrappers.
        out: What it returns for the rows of this process, computed while ``counting_own_objects``.
        objects: Their objects.
        rows: How many of the rows count: all or none.

    Returns:
        The loss. Its gradient is as in ``mean_of_all``.
    """
    import torch

    device, processes = out.loss.device, process_count()
    name, config = model.loss_function.__name__, model.config
    if name in _DIVIDED_BY_MEAN:
        counted = torch.tensor(float(rows > 0), device=device)
        return mean_of_all(out.loss, counted, torch.tensor(float(processes), device=device))
    number = torch.tensor(float(objects if rows else 0), device=device)
    whole = torch.stack(tensors_of_all(number)).sum().clamp(min=1)
    own = number.clamp(min=1) * float(rows > 0)
    if name != "ForObjectDetectionLoss":
        return mean_of_all(out.loss, own, whole)
    # DETR's term of the classes is a mean over all queries, in which those without an object have another weight.
    terms = [value for key, value in out.loss_dict.items() if key.startswith("loss_ce")]
    classes = torch.stack(terms).sum()
    queries = out.logits.shape[1] * rows
    weight = number + config.eos_coefficient * (queries - number)
    return mean_of_all(out.loss - classes, own, whole) + mean_of_all(classes, weight)
