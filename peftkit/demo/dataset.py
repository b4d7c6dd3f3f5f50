"""From examples to padded token batches, with the loss on the answer alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from peftkit.demo.generator import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a position that the loss leaves out."""

_LENGTH_MULTIPLE = 4


def prompt_of(request: str) -> str:
    """The text the model is given: training and evaluation share this one line.

    Language models attend to their first token from everywhere whatever it says, so that a name there is hard to copy;
    the sign in front takes that place.
    """
    return f"> {request}\nJSON:"


def encode(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Tokenise prompt, answer and end of sequence; the prompt gets no loss.

    Prompt and answer are tokenised apart, so that the prompt has the same tokens in the evaluation.
    """
    prompt = tokenizer(prompt_of(example.request), add_special_tokens=False)["input_ids"]
    answer = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
    answer = [*answer, tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


def order_in_batches(
    lengths: Sequence[int], batch_size: int, seed: int, window: int = 16
) -> list[int]:
    """Order examples so that every ``batch_size`` consecutive ones are of similar length.

    Examples are shuffled, sorted by length within windows of ``window`` batches (a sort over everything would put one intent
    in each batch), and the batches shuffled again. Examples that fill no batch are left out.

    Returns:
        Indices into ``lengths``; a multiple of ``batch_size`` of them.
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
    """Pad on the right: ``Int64[rows, longest]`` for ``input_ids`` and ``labels``, ``longest`` rounded up to a multiple of 4.

    Fewer different lengths mean fewer matrix shapes, for each of which oneDNN keeps code of its own.
    No attention mask: with causal attention no real token sees the padding on its right, and the padding has no loss.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    longest += -longest % _LENGTH_MULTIPLE

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

    return {"input_ids": padded("input_ids", pad_token_id), "labels": padded("labels", IGNORED)}
