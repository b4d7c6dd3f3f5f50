"""What contrastive tasks share: the losses over a batch, and batches that are encoded in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from peftkit.errors import ContractError

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


def batch_loss(vectors: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a classifier that finds the partner of each row among the partners of all rows.

    Args:
        vectors: ``Float32[2 · rows, width]``, all rows before all partners.
        temperature: Cosines are divided by this number.

    Returns:
        The loss and the scores, ``Float32[rows, rows]``. A batch of one row has the loss 0, because it has no negatives.
    """
    import torch

    rows, partners = torch.nn.functional.normalize(vectors, dim=-1).chunk(2)
    scores = rows @ partners.T / temperature
    if len(scores) == 1:
        return scores.sum() * 0.0, scores
    wanted = torch.arange(len(scores), device=scores.device)
    return torch.nn.functional.cross_entropy(scores, wanted), scores


def two_sided_loss(vectors: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a classifier that finds the other view of each view among all other views of the batch (NT-Xent).

    Args:
        vectors: ``Float32[2 · rows, width]``, the first view of each row before the second views.
        temperature: Cosines are divided by this number.

    Returns:
        The loss, and the scores of the first views against the second, ``Float32[rows, rows]``.

    Source: Chen et al., 2020, arXiv:2002.05709, section 2.1.
    """
    import torch

    unit = torch.nn.functional.normalize(vectors, dim=-1)
    scores = unit @ unit.T / temperature
    rows = len(vectors) // 2
    own = scores[:rows, rows:]
    if rows == 1:
        return scores.sum() * 0.0, own
    scores = scores.masked_fill(torch.eye(2 * rows, dtype=torch.bool, device=scores.device), -1e9)
    wanted = torch.arange(2 * rows, device=scores.device).roll(rows)
    return torch.nn.functional.cross_entropy(scores, wanted), own


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
