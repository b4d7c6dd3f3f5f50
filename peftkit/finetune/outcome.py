"""After training: did the trained tensors change, are they finite, and would the adapter have an effect?"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from peftkit.checks.adapters import adapter_tensors

_DECIDING = ("lora_B", "lora_embedding_B", ".up.weight", ".gate")
"""Roles of the tensors that start at zero: while all are zero, the adapter changes nothing."""


def digests(model: nn.Module) -> dict[str, str]:
    """A digest of each trainable parameter by name."""
    return {name: _digest(p) for name, p in model.named_parameters() if p.requires_grad}


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(values.data, digest_size=16).hexdigest()


def judge(
    model: nn.Module, before: dict[str, str], is_adapter: bool
) -> tuple[list[str], list[str]]:
    """Compare the trained tensors with those before training.

    Args:
        model: The trained model.
        before: ``digests`` of the model before training.
        is_adapter: Whether an adapter was trained.

    Returns:
        Problems, with which the run has failed, and notes.
    """
    parameters = dict(model.named_parameters())
    same = [name for name, digest in before.items() if _digest(parameters[name]) == digest]
    broken = [name for name in before if not bool(parameters[name].isfinite().all())]
    problems, notes = [], []
    changed = len(before) - len(same)
    if broken:
        problems.append(
            f"{len(broken)} of {len(before)} trained tensors are not finite, such as {broken[0]}"
        )
    if not changed:
        problems.append(
            f"training changed none of the {len(before)} trained tensors; the learning rate may be too small for their dtype"
        )
    else:
        notes.append(f"{changed} of {len(before)} trained tensors changed")
    if same and changed:
        notes.append(f"unchanged: {', '.join(same[:4])}{' ...' if len(same) > 4 else ''}")
    if is_adapter:
        problem = _without_effect(model)
        problems += [problem] if problem else []
    return problems, notes


def _without_effect(model: nn.Module) -> str | None:
    """A sentence if every tensor that decides about the adapter's effect is zero."""
    deciding = [t for t in adapter_tensors(model) if any(mark in t.role for mark in _DECIDING)]
    if deciding and not any(bool(t.tensor.any()) for t in deciding):
        return f"the adapter is zero: all {len(deciding)} tensors like {deciding[0].name} are zero, so it has no effect"
    return None
