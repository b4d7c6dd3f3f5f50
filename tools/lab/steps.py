"""A schedule forward and backward on Triton, without autograd and launch plans: to record or watch what it launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """What a schedule has returned forward and backward."""

    result: Any
    made: Any
    grads: Any


def step(schedule: Any, call: Any, needs: Any = None) -> Step:
    """Both directions of a call, for uninitialised gradients of its result.

    Args:
        schedule: A module ``ops.<op>.schedule``.
        call: Its arguments.
        needs: Which gradients are computed, in the form of ``schedule.trained``. The default is all.
    """
    result, made = schedule.forward(schedule.TritonPasses(), call)
    needs = wanted(schedule.trained(call)) if needs is None else needs
    kept = schedule.keep(call, result, made, needs)
    is_one = isinstance(result, Tensor)
    grads: Any = torch.empty_like(result) if is_one else [torch.empty_like(y) for y in result]
    return Step(result, made, schedule.backward(schedule.TritonPasses(), kept, grads, needs))


def wanted(trained: Any) -> Any:
    """``trained`` with True instead of each tensor and False instead of ``None``."""
    if trained is None or isinstance(trained, Tensor):
        return trained is not None
    parts = [wanted(part) for part in trained]
    return type(trained)(*parts) if hasattr(trained, "_fields") else parts
