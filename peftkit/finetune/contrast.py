"""What contrastive tasks share: the losses over a batch, and batches that are encoded in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from peftkit.errors import ContractError
from peftkit.finetune.processes import (
    process_count,
    process_index,
    rows_in_last_batch,
    tensors_of_all,
)

if TYPE_CHECKING:
    import torch

CHUNK = (
    "Rows in one forward. The gradients are those of the whole batch; the memory is that of one chunk, for a second forward. "
    "null: the whole batch at once"
)


def in_chunks(
    encode: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    batch: dict[str, torch.Tensor],
    chunk: int | None,
) -> torch.Tensor:
    """Encode a batch a few rows at a time, so that the activations of one chunk are in memory at a time.

    The vectors of all chunks are kept, the activations are computed again in the backward, chunk by chunk, with the same dropout.

    Args:
        encode: Makes ``Float[rows, width]`` of a batch.
        batch: Inputs of the model, with one row for each text or image.
        chunk: Rows in one forward; ``None`` for all.

    Source: Gao et al., 2021, arXiv:2101.06983.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    rows = len(next(iter(batch.values())))
    if chunk is None or chunk >= rows:
        return encode(batch)
    found = []
    for start in range(0, rows, chunk):
        part = {name: tensor[start : start + chunk] for name, tensor in batch.items()}
        again = torch.is_grad_enabled()
        found.append(checkpoint(encode, part, use_reentrant=False) if again else encode(part))
    return torch.cat(found)


class _Pairs(NamedTuple):
    """The rows and partners of a batch in all processes, those of this process first.

    Attributes:
        vectors: ``Float32[2 · all rows, width]`` of length one, all rows before all partners. Those of other processes have no gradient;
            that of its own is multiplied by the number of processes, over which the gradients of weights are averaged.
        repeats: ``Bool[all rows]``: rows that fill up the last batch of an evaluation and were in it before, or ``None``.
        own: The number of rows of this process.
    """

    vectors: torch.Tensor
    repeats: torch.Tensor | None
    own: int


def batch_loss(vectors: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a classifier that finds the partner of each row among the partners of all rows, in all processes of a run.

    Args:
        vectors: ``Float32[2 · rows, width]``, all rows of this process before all partners.
        temperature: Cosines are divided by this number.

    Returns:
        The loss, the same in all processes, and the scores, ``Float32[rows, all rows]``. A batch of one row has the loss 0, because it has
        no negatives.
    """
    pairs = _of_all(vectors)
    rows, partners = pairs.vectors.chunk(2)
    scores = rows @ partners.T / temperature
    if pairs.repeats is not None:
        scores = scores.masked_fill(pairs.repeats, -1e9)
    return _found(scores, 0, pairs.repeats), scores[: pairs.own]


def two_sided_loss(vectors: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a classifier that finds the other view of each view among all other views of the batch (NT-Xent).

    Args:
        vectors: ``Float32[2 · rows, width]``, the first view of each row of this process before the second views.
        temperature: Cosines are divided by this number.

    Returns:
        The loss, the same in all processes of a run, and the scores of the first views against the second, ``Float32[rows, all rows]``.

    Source: Chen et al., 2020, arXiv:2002.05709, section 2.1.
    """
    import torch

    pairs = _of_all(vectors)
    rows = len(pairs.vectors) // 2
    scores = pairs.vectors @ pairs.vectors.T / temperature
    hidden = torch.eye(2 * rows, dtype=torch.bool, device=scores.device)
    repeats = pairs.repeats
    if repeats is not None:
        repeats = torch.cat([repeats, repeats])
        hidden = hidden | repeats
    loss = _found(scores.masked_fill(hidden, -1e9), rows, repeats)
    return loss, scores[: pairs.own, rows:]


def pairs_of_all(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows and the partners of a batch in all processes, for a loss that is the same in all of them.

    Args:
        vectors: ``Float32[2 · rows, width]``, all rows of this process before all partners.

    Returns:
        Two times ``Float32[all rows, width]``, of length one, with the gradients of ``_Pairs.vectors``; without the rows that fill up the
        last batch of an evaluation.
    """
    pairs = _of_all(vectors)
    rows, partners = pairs.vectors.chunk(2)
    return (
        (rows, partners)
        if pairs.repeats is None
        else (rows[~pairs.repeats], partners[~pairs.repeats])
    )


def _found(scores: torch.Tensor, shift: int, repeats: torch.Tensor | None) -> torch.Tensor:
    """The loss of a classifier that chooses column ``row + shift`` in each row that is no repetition; 0 if there is one pair alone."""
    import torch

    wanted = torch.arange(len(scores), device=scores.device).roll(shift)
    if repeats is not None:
        scores, wanted = scores[~repeats], wanted[~repeats]
    if len(scores) == (2 if shift else 1):
        return scores.sum() * 0.0
    return torch.nn.functional.cross_entropy(scores, wanted)


def _of_all(vectors: torch.Tensor) -> _Pairs:
    import torch

    unit = torch.nn.functional.normalize(vectors, dim=-1)
    own, processes = len(unit) // 2, process_count()
    if processes == 1:
        return _Pairs(unit, None, own)
    parts = tensors_of_all(unit)
    parts[process_index()] = unit.detach() + processes * (unit - unit.detach())
    order = sorted(range(processes), key=lambda process: process != process_index())
    sides = [torch.cat([parts[p].chunk(2)[side] for p in order]) for side in (0, 1)]
    numbers = torch.tensor([p * own + row for p in order for row in range(own)])
    rows = rows_in_last_batch()
    repeats = None if rows is None else (numbers >= rows).to(unit.device)
    return _Pairs(torch.cat(sides), repeats, own)


def unused_pooler(model: Any) -> list[str]:
    """The linear layer of a pooler, which the loss does not depend on."""
    return ["pooler.dense"] if hasattr(getattr(model, "pooler", None), "dense") else []


def require_batch(rows: list[Any], task: str) -> None:
    """Raise ``ContractError`` if a batch has fewer than two rows."""
    if len(rows) < 2:
        raise ContractError(
            f"task={task} compares the rows of a batch, but a batch has {len(rows)}; use training.batch_size=16 or more, and "
            "enough rows"
        )
