"""Text that every machine has: the reference of the Python language, which Python ships. Every fifth topic is held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def text_blocks(encode: Callable[[str], Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
    """Token ids in blocks: those for training in a fixed random order, and the held-out ones.

    Args:
        encode: Returns the token ids of a topic, with its end.
        length: Tokens per block.

    Returns:
        Two ``Int64[blocks, length]``.
    """
    from pydoc_data.topics import topics

    parts: tuple[list[int], list[int]] = ([], [])
    for i, name in enumerate(sorted(topics)):
        parts[i % 5 == 4].extend(encode(topics[name]))
    blocks, held_out = (
        torch.tensor(ids[: len(ids) // length * length]).view(-1, length) for ids in parts
    )
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
    return blocks[order], held_out
