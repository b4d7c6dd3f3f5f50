"""Groups of adapters on one input that share each pass over it.

Adapters without dropout, or with the same mask (equal p and seed), form a group: one shrink with their stacked A's, and one
pass for all dA's. The sum of a group's ranks is at most ``RANK_TILE``, unless it is one adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkit_kernels.low_rank import passes
from peftkit_kernels.low_rank.config import RANK_TILE
from peftkit_kernels.low_rank.torch_impl import LoRA, adapter_dtype, cast

Groups = list[list[int]]


def group(loras: Sequence[LoRA | None]) -> Groups:
    """Indices of the adapters that are not ``None``, by group."""
    open_groups: dict[tuple, list[int]] = {}
    found: Groups = []
    for i, lora in enumerate(loras):
        if lora is None:
            continue
        key = (lora.p, lora.seed if lora.p else 0, lora.A.dtype)
        members = open_groups.get(key)
        # a group that is full is replaced by a new one with the same key
        if members is None or rank_of(loras, members) + lora.A.shape[0] > RANK_TILE:
            members = open_groups[key] = []
            found.append(members)
        members.append(i)
    return found


def rank_of(loras: Sequence[LoRA | None], members: Sequence[int]) -> int:
    """Sum of the ranks of some adapters."""
    return sum(_present(loras, i).A.shape[0] for i in members)


def stacked(loras: Sequence[LoRA | None], members: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The A's of a group on top of each other, ``[ΣR, K]`` in ``dtype``."""
    factors = [cast(_present(loras, i).A, dtype) for i in members]
    return factors[0] if len(factors) == 1 else torch.cat(factors)


def stacked_factor(
    x: Tensor, loras: Sequence[LoRA | None], members: Sequence[int]
) -> tuple[Tensor, float, int]:
    """The A's of a group as its shrink of ``x`` reads them, and the mask of the group: its probability and seed."""
    first = _present(loras, members[0])
    return stacked(loras, members, adapter_dtype(x, first.A)), first.p, first.seed


def shrink_groups(x: Tensor, loras: Sequence[LoRA | None], groups: Groups) -> list[Tensor]:
    """``drop(x) Aᵀ`` of every group, ``[M, ΣR]`` each."""
    return [passes.shrink(x, *stacked_factor(x, loras, members)) for members in groups]


def members_of(
    joint: Sequence[Tensor], loras: Sequence[LoRA | None], groups: Groups, dim: int
) -> list[Tensor | None]:
    """Each adapter's part of its group's joint tensor, as a view; ``dim`` is the axis of ranks."""
    parts: list[Tensor | None] = [None] * len(loras)
    for tensor, members in zip(joint, groups, strict=True):
        sizes = [rank_of(loras, [i]) for i in members]
        for i, part in zip(members, tensor.split(sizes, dim), strict=True):
            parts[i] = part
    return parts


def add_updates(
    dx: Tensor | None,
    ds: Sequence[Tensor],
    loras: Sequence[LoRA | None],
    groups: Groups,
    dtype: torch.dtype,
) -> Tensor | None:
    """``dx + Σ mask ∘ (ds A)`` over the groups, in ``dtype``, rounded once for each group. ``dx`` may be ``None``, else it is changed in place."""
    for joint, members in zip(ds, groups, strict=True):
        first = _present(loras, members[0])
        A = stacked(loras, members, joint.dtype)
        dropped = {"p": first.p, "seed": first.seed}
        dx = passes.expand(joint, A.t(), 1.0, **dropped, out=dx, add=dx is not None, dtype=dtype)
    return dx


def grads_of_a(
    x: Tensor, ds: Sequence[Tensor], loras: Sequence[LoRA | None], groups: Groups
) -> list[Tensor]:
    """``dsᵀ drop(x)`` of every group, ``[ΣR, K]`` each."""
    grads = []
    for joint, members in zip(ds, groups, strict=True):
        first = _present(loras, members[0])
        grads.append(passes.grad_a(joint, x, first.A.dtype, first.p, first.seed))
    return grads


def _present(loras: Sequence[LoRA | None], i: int) -> LoRA:
    lora = loras[i]
    assert lora is not None
    return lora
