"""Convert examples to padded token batches. Only the answer has a loss."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from demo.generator import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a position without a loss."""

_LENGTH_MULTIPLE = 4


def prompt_of(request: str) -> str:
    """Return the prompt for a request. Training and evaluation both use it.

    Language models attend to the first token from every position, whatever its meaning, so a name at this position is hard to
    copy. The prompt therefore starts with a sign.
    """
    return f"> {request}\nJSON:"


def encode(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Tokenise prompt, answer and end of sequence. The prompt has no loss.

    Prompt and answer are tokenised separately, so that the prompt has the same tokens in the evaluation.

    Returns:
        ``input_ids`` and ``labels``, lists of the same length.
    """
    prompt = tokenizer(prompt_of(example.request), add_special_tokens=False)["input_ids"]
    answer = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
    answer = [*answer, tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


def order_in_batches(
    lengths: Sequence[int], batch_size: int, seed: int, window: int = 16
) -> list[int]:
    """Order examples so that every ``batch_size`` consecutive examples have similar lengths.

    Examples are shuffled, then sorted by length within windows of ``window`` batches, then the batches are shuffled. A sort of
    all examples would put a single intent in each batch. An incomplete last batch is left out.

    Returns:
        Indices into ``lengths``; their number is a multiple of ``batch_size``.
    """
    rng = random.Random(seed)
    shuffled = list(range(len(lengths)))
    rng.shuffle(shuffled)
    batches: list[list[int]] = []
    for start in range(0, len(shuffled), window * batch_size):
        part = sorted(shuffled[start : start + window * batch_size], key=lengths.__getitem__)
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    batches = [batch for batch in batches if len(batch) == batch_size]
    rng.shuffle(batches)
    return [index for batch in batches for index in batch]


def collate(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right.

    The length is rounded up to a multiple of 4, because oneDNN generates and keeps code for each matrix shape. No attention
    mask is needed: with causal attention no token attends to padding on its right, and the padding has no loss.

    Returns:
        ``input_ids`` and ``labels``, each ``Int64[rows, length]``.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    longest += -longest % _LENGTH_MULTIPLE

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

    return {"input_ids": padded("input_ids", pad_token_id), "labels": padded("labels", IGNORED)}
