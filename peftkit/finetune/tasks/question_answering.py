"""Extractive question answering: the answer is a part of the context. Long contexts are read in windows that overlap."""

from __future__ import annotations

import contextlib
import json
import re
import string
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from peftkit.errors import ContractError, short
from peftkit.finetune.schema import key
from peftkit.finetune.tasks.base import BadRow, Encoded, Task, pad_tokens, text_of

if TYPE_CHECKING:
    import torch

_NO_CONTEXT = -1
"""Offset of a token outside the context."""


@dataclass
class Options:
    """Options of ``question_answering``."""

    stride: int | None = key(
        None, "Tokens that two windows share. null: a third of training.seq_len", least=0
    )
    max_answer_tokens: int = key(30, "Largest number of tokens of an answer", least=1)
    unanswerable: bool = key(False, "Rows may have no answer, and the model may give none")


class QuestionAnswering(Task):
    """Questions with a context that contains the answer, as in SQuAD.

    Source: Rajpurkar et al., 2016, arXiv:1606.05250, for the scores; Rajpurkar et al., 2018, arXiv:1806.03822, for rows without an
    answer.
    """

    name = "question_answering"
    summary = "questions with a context, of which the answer is a part, as in SQuAD"
    auto_class = "AutoModelForQuestionAnswering"
    task_type = "QUESTION_ANS"
    columns: ClassVar[dict[str, str]] = {
        "question": "the question",
        "context": "the text with the answer",
        "answers": "{text: [...], answer_start: [...]}, the answers and their first characters",
        "answer": "the text of one answer, instead of answers",
        "answer_start": "its first character in the context, counted from 0",
    }
    Options = Options
    metric_names = ("f1", "exact_match")
    best_metric = "f1"
    seq_len = 384
    label_names = ("start_positions", "end_positions")
    smooths_labels = False

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        question, context = text_of(row, "question").strip(), text_of(row, "context")
        answers = _answers(row, context)
        options, size = self.setting.options, self.setting.seq_len
        stride = size // 3 if options.stride is None else options.stride
        if not answers and not options.unanswerable:
            raise BadRow("the row has no answer; set task.unanswerable=true if that is allowed")
        tokenizer = self.setting.tokenizer
        taken = len(tokenizer(question, "").input_ids)
        if size - taken <= stride:
            raise BadRow(
                f"the question and the special tokens have {taken} tokens, which leaves {size - taken} of training.seq_len={size} for the "
                f"context, but windows share task.stride={stride}; use a larger seq_len or a smaller stride"
            )
        found = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=size,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        windows = [self._window(found, index) for index in range(len(found["input_ids"]))]
        places = [_place(window, answers[0]) if answers else None for window in windows]
        if answers and not any(places):
            raise BadRow(
                f"no window of training.seq_len={size} tokens holds the whole answer {short(answers[0][0])}; use a larger seq_len or "
                "task.stride"
            )
        rows = []
        for number, (window, place) in enumerate(zip(windows, places, strict=True)):
            start, end = place or (window["no_answer"],) * 2
            rows.append(
                window
                | {"start_positions": start, "end_positions": end, "window": number}
                | {"context": context, "answers": [text for text, _ in answers]}
            )
        return [Encoded(one, len(one["input_ids"]), 2) for one in rows]

    def _window(self, found: Any, index: int) -> dict[str, Any]:
        """The inputs of one window, the place of each token in the context, and the position that stands for no answer."""
        names = [name for name in ("input_ids", "token_type_ids") if name in found]
        window: dict[str, Any] = {name: list(found[name][index]) for name in names}
        inside = [part == 1 for part in found.sequence_ids(index)]
        places = list(zip(inside, found["offset_mapping"][index], strict=True))
        window["starts"] = [place[0] if used else _NO_CONTEXT for used, place in places]
        window["ends"] = [place[1] if used else _NO_CONTEXT for used, place in places]
        first = self.setting.tokenizer.cls_token_id
        ids = window["input_ids"]
        window["no_answer"] = ids.index(first) if first in ids else 0
        return window

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        places = {name: torch.tensor([row[name] for row in rows]) for name in self.label_names}
        return pad_tokens(rows, self.setting.tokenizer.pad_token_id) | places

    def render(self, features: dict[str, Any]) -> str:
        decode = self.setting.tokenizer.decode
        start, end = features["start_positions"], features["end_positions"]
        answer = decode(features["input_ids"][start : end + 1])
        shown = "no answer" if start == features["no_answer"] else f"«{answer}»"
        return f"{decode(features['input_ids'])} -> {shown}"

    def check_model(self, model: Any, rows: list[dict[str, Any]]) -> None:
        if getattr(model.config, "num_labels", 2) != 2:
            raise ContractError(
                f"task=question_answering needs a head with 2 outputs, and {type(model).__name__} has {model.config.num_labels}; remove "
                "num_labels and id2label from its config.json"
            )

    def model_arguments(self) -> dict[str, Any]:
        return {"num_labels": 2}

    def keep_of_logits(self, logits: Any, labels: Any) -> Any:
        # Some models return other outputs after them.
        return tuple(scores.float() for scores in logits[:2])

    def scores(self, rows: Any, predictions: Any, labels: Any) -> dict[str, float]:
        found = self.answers_of(rows, *predictions)
        wanted = [row["answers"] for row in rows if row["window"] == 0]
        both = list(zip(found, wanted, strict=True))
        return {
            "f1": float(np.mean([best_score(word_f1, one, gold) for one, gold in both])),
            "exact_match": float(
                np.mean([best_score(exact_match, one, gold) for one, gold in both])
            ),
        }

    def answers_of(self, rows: Any, starts: Any, ends: Any) -> list[str]:
        """The best answer over all windows of each question; empty if the position for no answer is better in each window.

        Args:
            rows: Encoded rows; the windows of a question follow each other.
            starts: ``Float32[rows, tokens]``, logits of the first token of the answer.
            ends: ``Float32[rows, tokens]``, of the last one.
        """
        best: list[tuple[float, str]] = []
        none: list[float] = []
        for row, start, end in zip(rows, starts, ends, strict=True):
            score, answer = self._best_span(row, start, end)
            nothing = float(start[row["no_answer"]] + end[row["no_answer"]])
            if row["window"] == 0:
                best.append((score, answer))
                none.append(nothing)
            else:
                best[-1] = max(best[-1], (score, answer), key=lambda found: found[0])
                none[-1] = min(none[-1], nothing)
        allowed = self.setting.options.unanswerable
        return [
            "" if allowed and nothing > score else answer
            for (score, answer), nothing in zip(best, none, strict=True)
        ]

    def _best_span(self, row: dict[str, Any], start: Any, end: Any) -> tuple[float, str]:
        inside = np.flatnonzero(np.asarray(row["starts"]) != _NO_CONTEXT)
        pairs = np.asarray(start)[inside][:, None] + np.asarray(end)[inside][None]
        distance = np.arange(len(inside))[None] - np.arange(len(inside))[:, None]
        fits = (distance >= 0) & (distance < self.setting.options.max_answer_tokens)
        first, last = np.unravel_index(np.argmax(np.where(fits, pairs, -np.inf)), pairs.shape)
        text = row["context"][row["starts"][inside[first]] : row["ends"][inside[last]]]
        return float(pairs[first, last]), text


def _answers(row: dict[str, Any], context: str) -> list[tuple[str, int]]:
    """The answers and their first characters, checked against the context."""
    given = row.get("answers")
    if isinstance(given, str):
        # A cell of a CSV file.
        with contextlib.suppress(ValueError):
            given = json.loads(given)
    if given is None and row.get("answer") in (None, ""):
        return []
    if given is None:
        given = {"text": [row["answer"]], "answer_start": [row.get("answer_start")]}
    if isinstance(given, list) and all(isinstance(one, dict) for one in given):
        given = {name: [one.get(name) for one in given] for name in ("text", "answer_start")}
    if not isinstance(given, dict) or not {"text", "answer_start"} <= given.keys():
        raise BadRow(f"column 'answers' is {short(given)}; it must have text and answer_start")
    texts, starts = given["text"], given["answer_start"]
    if not isinstance(texts, (list, tuple)):
        texts, starts = [texts], [starts]
    if not isinstance(starts, (list, tuple)) or len(texts) != len(starts):
        raise BadRow(f"{len(texts)} answers, but answer_start is {short(starts)}")
    return [_answer(text, start, context) for text, start in zip(texts, starts, strict=True)]


def _answer(text: Any, start: Any, context: str) -> tuple[str, int]:
    if not isinstance(text, str) or not text.strip():
        raise BadRow(f"the answer {short(text)} is empty or not text")
    if isinstance(start, str) and start.strip().isdigit():
        start = int(start)
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise BadRow(f"answer_start is {short(start)}, not the number of a character")
    if context[start : start + len(text)] != text:
        elsewhere = context.find(text)
        hint = "it is nowhere" if elsewhere < 0 else f"it is at {elsewhere}"
        raise BadRow(
            f"the answer {short(text)} is not at answer_start={start} of the context, where {short(context[start : start + len(text)])} "
            f"is; {hint}"
        )
    return text, start


def _place(window: dict[str, Any], answer: tuple[str, int]) -> tuple[int, int] | None:
    """The first and the last token of an answer, or ``None`` if the window does not hold all of it."""
    text, begin = answer
    # Tokens may leave out the spaces around an answer.
    begin, stop = begin + len(text) - len(text.lstrip()), begin + len(text.rstrip())
    tokens = [
        number
        for number, (start, end) in enumerate(zip(window["starts"], window["ends"], strict=True))
        if start != _NO_CONTEXT and start < stop and end > begin
    ]
    if not tokens or window["starts"][tokens[0]] > begin or window["ends"][tokens[-1]] < stop:
        return None
    return tokens[0], tokens[-1]


def normalized(text: str) -> list[str]:
    """The words of an answer as SQuAD compares them: in small letters, without punctuation and articles."""
    letters = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", letters).split()


def exact_match(found: str, wanted: str) -> float:
    """1 if the words are the same, else 0."""
    return float(normalized(found) == normalized(wanted))


def word_f1(found: str, wanted: str) -> float:
    """The harmonic mean of the shares of words that two answers have in common."""
    ours, theirs = normalized(found), normalized(wanted)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def best_score(score: Any, found: str, wanted: list[str]) -> float:
    """The best score over the right answers; a question without one wants an empty answer."""
    return max(score(found, one) for one in wanted or [""])


TASK = QuestionAnswering
