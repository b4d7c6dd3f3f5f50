"""One class for a text, or for a pair of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.finetune.tasks.base import (
    Encoded,
    Task,
    label_name,
    number_of_label,
    pad_tokens,
    sorted_labels,
    text_of,
)
from peftkit.finetune.tasks.scores import accuracy, macro_f1

if TYPE_CHECKING:
    import torch


class TextClassification(Task):
    """Texts with a label."""

    name = "text_classification"
    summary = "texts, or pairs of texts, with one label each"
    auto_class = "AutoModelForSequenceClassification"
    task_type = "SEQ_CLS"
    columns: ClassVar[dict[str, str]] = {
        "text": "the text",
        "text_pair": "a second text (optional)",
        "label": "the name or number of the class",
    }
    metric_names = ("accuracy", "f1")
    best_metric = "accuracy"
    distils = "same"

    @classmethod
    def labels_of(cls, row: dict[str, Any]) -> set[str]:
        return {label_name(row["label"])} if row.get("label") not in (None, "") else set()

    @classmethod
    def find_labels(cls, names: set[str], options: Any) -> list[str]:
        return sorted_labels(names)

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        label = number_of_label(row.get("label"), self.setting.labels)
        pair = text_of(row, "text_pair", optional=True)
        tokenizer, size = self.setting.tokenizer, self.setting.seq_len
        texts = (text_of(row, "text"), *([pair] if pair else []))
        length = len(tokenizer(*texts).input_ids)
        found = tokenizer(*texts, truncation=True, max_length=size)
        features = {
            name: list(found[name]) for name in ("input_ids", "token_type_ids") if name in found
        }
        return [Encoded(features | {"labels": label}, length, 1)]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        labels = torch.tensor([row["labels"] for row in rows])
        return pad_tokens(rows, self.setting.tokenizer.pad_token_id) | {"labels": labels}

    def render(self, features: dict[str, Any]) -> str:
        text = self.setting.tokenizer.decode(features["input_ids"])
        return f"{text} -> «{self.setting.labels[features['labels']]}»"

    def keep_of_logits(self, logits: Any, labels: Any) -> Any:
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits.argmax(-1)

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        return {"accuracy": accuracy(predictions, labels), "f1": macro_f1(predictions, labels)}


TASK = TextClassification
