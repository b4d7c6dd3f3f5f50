"""After training: did the trained tensors change, are they finite, and would the adapter have an effect?"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from peftkit.checks.adapters import adapter_tensors
from peftkit.errors import count
from peftkit.finetune.divided import whole
from peftkit.finetune.zeros import kept_zeros

_DECIDING = ("lora_B", "lora_embedding_B", ".up.weight", ".gate")
"""Roles of the tensors that start at zero: while all are zero, the adapter changes nothing."""


_SMALL_BYTES = 2**20
"""Larger buffers are quantised weights rather than statistics, and are not compared."""


def base_buffers(model: nn.Module) -> dict[str, str]:
    """A digest of each small buffer that the file of an adapter does not contain, by name."""
    found = {}
    for name, module in model.named_modules():
        if "modules_to_save." in f"{name}." or any(
            p.requires_grad for p in module.parameters(recurse=False)
        ):
            continue
        for own, buffer in module._buffers.items():
            stored = own not in module._non_persistent_buffers_set
            if stored and buffer is not None and buffer.nbytes <= _SMALL_BYTES:
                found[f"{name}.{own}"] = _digest(buffer)
    return found


def digests(model: nn.Module) -> dict[str, str]:
    """A digest of each trainable parameter by name."""
    return {name: _digest(p) for name, p in model.named_parameters() if p.requires_grad}


def _digest(tensor: Tensor) -> str:
    values = whole(tensor.detach()).contiguous().view(-1).view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(values.data, digest_size=16).hexdigest()


def judge(
    model: nn.Module, before: dict[str, str], is_adapter: bool
) -> tuple[list[str], list[str]]:
    """Compare the trained tensors with those before training.

    Args:
        model: The trained model.
        before: ``digests`` of the model before training, with ``base_buffers`` if an adapter was trained.
        is_adapter: Whether an adapter was trained.

    Returns:
        Problems, with which the run has failed, and notes.
    """
    parameters = dict(model.named_parameters())
    buffers = {name: digest for name, digest in before.items() if name not in parameters}
    before = {name: digest for name, digest in before.items() if name in parameters}
    same = [name for name, digest in before.items() if _digest(parameters[name]) == digest]
    broken = [name for name in before if not bool(whole(parameters[name]).isfinite().all())]
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
    zeros = kept_zeros(model)
    if zeros is not None:
        lost, kept = zeros.judge()
        problems, notes = problems + lost, notes + kept
    if is_adapter:
        problems += [p for p in (_without_effect(model), _lost(model, buffers)) if p]
    return problems, notes


def _without_effect(model: nn.Module) -> str | None:
    """A sentence if every tensor that decides about the adapter's effect is zero."""
    deciding = [t for t in adapter_tensors(model) if any(mark in t.role for mark in _DECIDING)]
    if deciding and not any(bool(t.tensor.any()) for t in deciding):
        return f"the adapter is zero: all {len(deciding)} tensors like {deciding[0].name} are zero, so it has no effect"
    return None


def _lost(model: nn.Module, before: dict[str, str]) -> str | None:
    """A sentence if training changed buffers of the frozen model, such as the statistics of batch norms."""
    after = base_buffers(model)
    changed = [name for name, digest in before.items() if after.get(name) != digest]
    if not changed:
        return None
    return (
        f"training changed {count(len(changed), 'buffer')} of the frozen model, such as {changed[0]}, which the adapter's file does not "
        "contain; the loaded adapter will compute something else"
    )
