"""Pack short rows into long ones, without letting one attend to another, and prove that a model keeps them apart."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from peftkit.checks.reach import undisturbed
from peftkit.errors import ContractError
from peftkit.finetune.logits import change
from peftkit.finetune.tasks.base import IGNORED, pad
from peftkit.fuse.int8_mode import outliers_in_8_bits

if TYPE_CHECKING:
    import torch


def pack(rows: list[dict[str, Any]], seq_len: int) -> list[dict[str, Any]]:
    """Put rows into as few packs of at most ``seq_len`` tokens as first-fit finds, the longest rows first.

    Positions start again at 0 in each row, by which transformers recognises where a row starts and masks the others. The label
    of a row's first token is ignored, because the output before it belongs to another row.

    Args:
        rows: Rows with ``input_ids`` and ``labels``.
        seq_len: Largest number of tokens in a pack.
    """
    order = sorted(range(len(rows)), key=lambda index: (-len(rows[index]["input_ids"]), index))
    packs: list[list[int]] = []
    room: list[int] = []
    by_room: dict[int, list[int]] = {}
    for index in order:
        size = len(rows[index]["input_ids"])
        fits = [free for free, open_packs in by_room.items() if free >= size and open_packs]
        if fits:
            free = min(fits)
            target = by_room[free].pop()
        else:
            target, free = len(packs), seq_len
            packs.append([])
            room.append(seq_len)
        packs[target].append(index)
        room[target] = free - size
        by_room.setdefault(room[target], []).append(target)
    return [_joined([rows[index] for index in sorted(members)]) for members in packs]


def _joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        found["input_ids"] += row["input_ids"]
        found["labels"] += [IGNORED, *row["labels"][1:]]
        found["position_ids"] += range(len(row["input_ids"]))
    return found


def collate_packs(rows: list[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    """Make a batch of packs: ``Int64[rows, length]``, without a mask. The padding is a row of its own, without labels."""
    longest = max(len(row["input_ids"]) for row in rows)
    positions = [[*row["position_ids"], *range(longest - len(row["input_ids"]))] for row in rows]
    return {
        "input_ids": pad([row["input_ids"] for row in rows], pad_id, 1),
        "labels": pad([row["labels"] for row in rows], IGNORED, 1),
        "position_ids": pad(positions, 0, 1),
        # With a cache transformers would not look for the starts of rows in the positions.
        "use_cache": False,
    }


def require_no_leaks(model: Any, length: int = 12) -> None:
    """Raise unless the model keeps rows of a pack apart: other tokens in the first row must not change the second row's logits.

    Args:
        model: A causal language model.
        length: Number of tokens of each of the two rows.

    Raises:
        ContractError: The model takes no positions, or the logits differ by more than rounding.
    """
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    way_out = "set task.packing=false"
    if "position_ids" not in inspect.signature(type(base).forward).parameters:
        raise ContractError(
            f"task.packing=true, but {type(base).__name__} takes no position_ids, so packed rows would read each other; {way_out}"
        )
    device = next(model.parameters()).device
    size = int(base.config.get_text_config().vocab_size)
    draw = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(0, size, (1, length), generator=draw) for _ in range(3))
    with undisturbed(model), outliers_in_8_bits(model):
        # As in training, where other kernels may run than in evaluation. With one seed dropout is the same in both passes.
        model.train()
        logits = []
        for begin in (first, other):
            torch.manual_seed(0)
            logits.append(model(**_two_rows(begin, second, device)).logits[:, length:].detach())
    difference = change(*logits)
    if difference:
        raise ContractError(
            f"task.packing=true, but {type(base).__name__} does not keep packed rows apart: tokens of one row change the logits of the "
            f"next by {difference:.3g}; {way_out}"
        )


def _two_rows(first: torch.Tensor, second: torch.Tensor, device: Any) -> dict[str, Any]:
    """A batch with one pack of two rows, as in training."""
    import torch

    rows = [{"input_ids": r[0].tolist(), "labels": r[0].tolist()} for r in (first, second)]
    batch = collate_packs([_joined(rows)], 0)
    del batch["labels"]
    return {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
