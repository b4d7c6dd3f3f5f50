"""One class for each word: names, parts of speech."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.errors import short
from peftkit.finetune.tasks.base import (
    IGNORED,
    BadRow,
    Encoded,
    Task,
    label_name,
    number_of_label,
    pad,
    pad_tokens,
    sorted_labels,
)
from peftkit.finetune.tasks.scores import span_f1, token_accuracy

if TYPE_CHECKING:
    import torch


class TokenClassification(Task):
    """Words with tags. The first token of each word carries its tag."""

    name = "token_classification"
    summary = "lists of words with one tag each, such as B-PER, I-PER and O"
    auto_class = "AutoModelForTokenClassification"
    task_type = "TOKEN_CLS"
    columns: ClassVar[dict[str, str]] = {
        "tokens": "a list of words, or a text with spaces between them",
        "tags": "a list of tags, one for each word, or a text with spaces between them",
    }
    metric_names = ("f1", "token_accuracy")
    best_metric = "f1"
    distils = "same"

    @classmethod
    def labels_of(cls, row: dict[str, Any]) -> set[str]:
        return {label_name(tag) for tag in _list(row, "tags")}

    @classmethod
    def find_labels(cls, names: set[str], options: Any) -> list[str]:
        return sorted_labels(names)

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        words, tags = _list(row, "tokens"), _list(row, "tags")
        if len(words) != len(tags):
            raise BadRow(f"{len(words)} tokens, but {len(tags)} tags")
        if not all(isinstance(word, str) and word for word in words):
            raise BadRow("column 'tokens' has an entry that is empty or not text")
        numbers = [number_of_label(tag, self.setting.labels, "tags") for tag in tags]
        tokenizer, size = self.setting.tokenizer, self.setting.seq_len
        length = len(tokenizer(words, is_split_into_words=True).input_ids)
        found = tokenizer(words, is_split_into_words=True, truncation=True, max_length=size)
        labels, before = [], None
        for word in found.word_ids():
            labels.append(IGNORED if word is None or word == before else numbers[word])
            before = word
        features = {"input_ids": list(found["input_ids"]), "labels": labels}
        return [Encoded(features, length, sum(label != IGNORED for label in labels))]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = pad_tokens(rows, self.setting.tokenizer.pad_token_id)
        return batch | {"labels": pad([row["labels"] for row in rows], IGNORED)}

    def render(self, features: dict[str, Any]) -> str:
        parts = []
        for token, label in zip(features["input_ids"], features["labels"], strict=True):
            text = self.setting.tokenizer.decode([token])
            parts.append(text if label == IGNORED else f"{text}«{self.setting.labels[label]}»")
        return " ".join(parts)

    def keep_of_logits(self, logits: Any, labels: Any) -> Any:
        return logits.argmax(-1)

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        names = self.setting.labels
        used = labels != IGNORED
        found = [[names[i] for i in row[mask]] for row, mask in zip(predictions, used, strict=True)]
        wanted = [[names[i] for i in row[mask]] for row, mask in zip(labels, used, strict=True)]
        return {"f1": span_f1(found, wanted), "token_accuracy": token_accuracy(predictions, labels)}


def _list(row: dict[str, Any], column: str) -> list[Any]:
    value = row.get(column)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRow(f"column {column!r} is no valid JSON list: {short(value)}") from None
    if isinstance(value, str):
        value = value.split()
    if not isinstance(value, (list, tuple)):
        raise BadRow(
            f"no column {column!r}"
            if column not in row
            else f"column {column!r} is {short(value)}, not a list"
        )
    if not value:
        raise BadRow(f"column {column!r} is empty")
    return list(value)


TASK = TokenClassification
