"""Time a few operations on this machine, estimate the time of the whole demo, and make the demo shorter if it would take too long.

The estimate counts tokens. What the two other methods of the comparison take is not timed here; ``_OTHERS`` is the largest ratio to
peftkit's step in ``benchmarks/results/training-smollm2.json``, rounded up.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from demo.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TIMED_STEPS = 2
_TIMED_TOKENS = 4
_ADAPTER = 1.2
"""The time of decoding with an adapter, relative to the base model."""
_OTHERS = 2.5 + 4.0
_PROCESS_SECONDS = 15.0
"""Start of a process that imports torch and loads the model."""
STEPS = 1 + _TIMED_STEPS + 1
"""Units of the progress of ``calibrate``."""

_SHORTER: tuple[dict[str, int], ...] = (
    {"held_out_pairs": 200},
    {"held_out_pairs": 100},
    {"held_out_pairs": 100, "compare_steps": 3},
    {"held_out_pairs": 100, "compare_steps": 3, "steps": 250},
    {"held_out_pairs": 100, "compare_steps": 3, "steps": 200},
    {"held_out_pairs": 100, "compare_steps": 3, "steps": 150},
)
"""Shorter runs, in the order in which they are tried. Training is shortened last, because the result depends on it."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What was timed, in seconds.

    Attributes:
        train_token: Forward, backward and step of the optimiser, for each token of a batch.
        prompt_token: Reading a prompt, for each of its tokens.
        decode_token: Writing one token of every answer of a batch, for each answer.
    """

    train_token: float
    prompt_token: float
    decode_token: float


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to do, in tokens.

    Attributes:
        train: Tokens of all training batches.
        prompts: Tokens of all held-out prompts.
        answers: Tokens of all wanted answers, which the tuned model writes.
        longest: Tokens at which an answer is cut off. The base model often writes as many.
        requests: Number of held-out requests.
    """

    train: int
    prompts: int
    answers: int
    longest: int
    requests: int


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    rows: Sequence[dict[str, Any]],
    settings: Settings,
    on_step: Callable[[int], None],
) -> Pace:
    """Time three training steps and a few decoded tokens. The model itself is not changed.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        requests: Requests to decode.
        rows: Training rows.
        settings: The settings of the run.
        on_step: Called with the number of finished parts, of ``STEPS``.
    """
    from demo.evaluate import decode_tokens
    from peftkit.base.memory import give_back

    seconds: list[float] = []

    def clock(tokens: int, _answered: int) -> None:
        seconds.append(time.perf_counter())

    batch = requests[: settings.decode_batch_size]
    began = time.perf_counter()
    decode_tokens(
        model,
        tokenizer,
        batch,
        max_new_tokens=_TIMED_TOKENS,
        batch_size=len(batch),
        on_progress=clock,
    )
    prompts = sum(map(len, _prompts(tokenizer, batch)))
    each = [b - a for a, b in itertools.pairwise(seconds)] or [seconds[0] - began]
    decode = min(each) / len(batch)
    prompt = max(seconds[0] - began - min(each), 0.0) / prompts
    on_step(1)
    train = _train_seconds(model, tokenizer, rows, settings, lambda done: on_step(1 + done))
    give_back()
    return Pace(train, prompt, decode)


def _train_seconds(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    settings: Settings,
    on_step: Callable[[int], None],
) -> float:
    """The seconds for each token of a step with adapters on a copy of the model, after one step that is not timed."""
    import torch

    from demo.compare import adapted, train_step

    with torch.random.fork_rng(devices=[]):
        tuned = adapted(copy.deepcopy(model), settings)
    tuned.train()
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, fused=True)
    best, size = math.inf, settings.batch_size
    for step in range(1 + _TIMED_STEPS):
        batch_rows = list(rows[step * size : (step + 1) * size]) or list(rows[:size])
        began = time.perf_counter()
        train_step(tuned, optimizer, trained, batch_rows, tokenizer.pad_token_id)
        seconds = time.perf_counter() - began
        if step:
            best = min(best, seconds / sum(len(row["input_ids"]) for row in batch_rows))
        on_step(1 + step)
    return best


def work(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    answers: Sequence[str],
    rows: Sequence[dict[str, Any]],
) -> Work:
    """Count the tokens."""
    lengths = [
        len(tokens) + 1
        for tokens in tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    ]
    return Work(
        train=sum(len(row["input_ids"]) for row in rows),
        prompts=sum(map(len, _prompts(tokenizer, requests))),
        answers=sum(lengths),
        longest=max(lengths),
        requests=len(requests),
    )


def _prompts(tokenizer: PreTrainedTokenizerBase, requests: Sequence[str]) -> list[list[int]]:
    from demo.dataset import prompt_of

    texts = [prompt_of(request) for request in requests]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def estimate(pace: Pace, todo: Work, settings: Settings, compare: bool) -> dict[str, float]:
    """The expected seconds of each phase that is still to come."""
    reading = pace.prompt_token * todo.prompts
    step = pace.train_token * todo.train / settings.steps
    found = {
        "base": reading + pace.decode_token * todo.requests * todo.longest,
        "training": step * settings.steps,
        "tuned": _ADAPTER * (reading + pace.decode_token * todo.answers),
        # both models decode all prompts, and the logits are computed in float64 too
        "proof": _PROCESS_SECONDS
        + 4 * (reading / todo.requests + pace.decode_token * todo.longest) * settings.proof_prompts,
    }
    if compare:
        steps = settings.compare_steps + 2
        found["comparison"] = 3 * _PROCESS_SECONDS + steps * step * (1 + _OTHERS)
    return found


def fitted(
    pace: Pace, todo: Work, settings: Settings, compare: bool, minutes: float
) -> tuple[Settings, dict[str, float]]:
    """The longest settings whose estimate is at most ``minutes``, or the shortest, with their estimate.

    ``todo`` is the work with ``settings``; that of shorter settings is in proportion.
    """
    found = settings, estimate(pace, todo, settings, compare)
    for changes in _SHORTER:
        if sum(found[1].values()) <= 60 * minutes:
            break
        lower = {name: min(value, getattr(settings, name)) for name, value in changes.items()}
        shorter = replace(settings, **lower)
        share = shorter.held_out_pairs / settings.held_out_pairs
        less = replace(
            todo,
            train=round(todo.train * shorter.steps / settings.steps),
            prompts=round(todo.prompts * share),
            answers=round(todo.answers * share),
            requests=shorter.held_out_pairs,
        )
        found = shorter, estimate(pace, less, shorter, compare)
    return found
