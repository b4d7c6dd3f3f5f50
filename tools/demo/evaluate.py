"""Decode many requests greedily, and score the predicted records."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from demo.answers import Answers
from demo.dataset import prompt_of
from demo.generator import Example
from peftkit.base.memory import give_back

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Score:
    """The score of predictions. All values are fractions from 0 to 1.

    Attributes:
        exact_match: Fraction of predictions whose parsed JSON equals the record, key for key and value for value.
        valid_json: Fraction of predictions that are a JSON object and nothing else.
        fields: Fraction of the records' leaves (``when.date``, ``items.0.count``) that the prediction has with the same value.
        by_intent: ``exact_match`` of each intent.
    """

    exact_match: float
    valid_json: float
    fields: float
    by_intent: dict[str, float]


def longest_answer(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens of the longest answer, including the end of sequence."""
    encoded = tokenizer([e.answer for e in examples], add_special_tokens=False)["input_ids"]
    return max(map(len, encoded)) + 1


def decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 50,
    on_progress: Callable[[int, int], None] | None = None,
    answers: Answers | None = None,
) -> list[str]:
    """Run ``decode_tokens``, and return the answers as texts without special tokens."""
    found = decode_tokens(
        model,
        tokenizer,
        requests,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        on_progress=on_progress,
        answers=answers,
    )
    return tokenizer.batch_decode(found, skip_special_tokens=True)


@torch.inference_mode()
def decode_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 50,
    on_progress: Callable[[int, int], None] | None = None,
    answers: Answers | None = None,
) -> list[list[int]]:
    """Continue each request greedily until the end of sequence or ``max_new_tokens``.

    Requests are decoded in batches of similar length, padded on the left. Finished rows are removed from the batch and the
    key-value cache, so that no time is spent on them.

    Args:
        model: A causal language model. It is in evaluation mode during decoding.
        tokenizer: The model's tokenizer.
        requests: English requests, without the text of the prompt.
        max_new_tokens: Maximum number of tokens of each answer, including the end of sequence.
        batch_size: Number of rows decoded at once.
        on_progress: Called after each step with the number of finished tokens, of ``len(requests) * max_new_tokens``, and of
            finished requests. All tokens of a finished request count as finished.
        answers: Answers that are already known; each further answer is added as soon as it is finished.

    Returns:
        The tokens of each answer without the end of sequence, in the order of ``requests``.
    """
    was_training = model.training
    model.eval()
    prompts = [
        tokenizer(prompt_of(request), add_special_tokens=False)["input_ids"] for request in requests
    ]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, list[int]] = {} if answers is None else answers.known
    finished = len(found)
    for start in range(0, len(order), batch_size):
        rows = [row for row in order[start : start + batch_size] if row not in found]
        running: dict[int, list[int]] = {row: [] for row in rows}
        steps = _decode_batch(model, tokenizer, prompts, rows, running, max_new_tokens)
        for written, ended in enumerate(steps if rows else (), 1):
            if ended:
                done = {row: running.pop(row) for row in ended}
                found |= done
                if answers is not None:
                    answers.add(done)
                finished += len(done)
            if on_progress is not None:
                on_progress(finished * max_new_tokens + written * len(running), finished)
    model.train(was_training)
    give_back()
    return [found[row] for row in range(len(prompts))]


def _decode_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    rows: list[int],
    answers: dict[int, list[int]],
    max_new_tokens: int,
) -> Iterator[list[int]]:
    """Append tokens to ``answers[row]`` until every row has ended. Yield the rows that have ended after each token."""
    device = model.device
    longest = max(len(prompts[row]) for row in rows)
    padding = [longest - len(prompts[row]) for row in rows]
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    tokens = torch.tensor(
        [[pad] * p + prompts[row] for p, row in zip(padding, rows, strict=True)], device=device
    )
    lengths = torch.tensor([len(prompts[row]) for row in rows], device=device)
    mask = torch.arange(longest, device=device) >= torch.tensor(padding, device=device)[:, None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    running = torch.tensor(rows)
    cache = None
    for step in range(max_new_tokens):
        out = model(
            input_ids=tokens,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        chosen = out.logits[:, -1].argmax(-1)  # [rows]
        for row, token in zip(running.tolist(), chosen.tolist(), strict=True):
            if token != eos:
                answers[row].append(token)
        last = step + 1 == max_new_tokens
        keep = (chosen != eos).nonzero().flatten()
        yield running.tolist() if last else running[(chosen == eos).cpu()].tolist()
        if len(keep) == 0:
            return
        if len(keep) < len(chosen):
            cache.batch_select_indices(keep)
            chosen, mask, lengths = chosen[keep], mask[keep], lengths[keep]
            running = running[keep.cpu()]
        tokens, positions = chosen[:, None], lengths[:, None]
        lengths = lengths + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)


def parse(text: str) -> dict[str, Any] | None:
    """Parse ``text`` as a JSON object. Return None if it is anything else."""
    try:
        record = json.loads(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def score(examples: Sequence[Example], predictions: Sequence[str]) -> Score:
    """Compare predictions with the records of ``examples``, in the same order.

    Raises:
        ValueError: The numbers of predictions and examples differ, or there are none.
    """
    if len(examples) != len(predictions) or not examples:
        raise ValueError(
            f"score needs one prediction per example, and at least one, but got {len(predictions)} for {len(examples)}"
        )
    hits: dict[str, list[bool]] = {}
    valid = right_fields = all_fields = 0
    for example, prediction in zip(examples, predictions, strict=True):
        record = parse(prediction)
        valid += record is not None
        hits.setdefault(example.intent, []).append(same_json(record, example.record))
        wanted = dict(_leaves(example.record))
        predicted = dict(_leaves(record)) if record is not None else {}
        all_fields += len(wanted)
        right_fields += sum(
            path in predicted and same_json(predicted[path], v) for path, v in wanted.items()
        )
    return Score(
        exact_match=sum(map(sum, hits.values())) / len(examples),
        valid_json=valid / len(examples),
        fields=right_fields / all_fields,
        by_intent={name: sum(hits[name]) / len(hits[name]) for name in sorted(hits)},
    )


def same_json(left: Any, right: Any) -> bool:
    """Whether two values are equal as JSON: 5 equals 5.0, but true does not equal 1."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_json(left[k], right[k]) for k in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same_json, left, right))
    return isinstance(left, bool) == isinstance(right, bool) and left == right


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    empty = True
    for key, child in children:
        empty = False
        yield from _leaves(child, f"{path}.{key}" if path else str(key))
    if empty:
        yield path, value
