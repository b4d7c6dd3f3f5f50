"""Text embeddings by in-batch contrast: each text must be closer to its own partner than to those of the other rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from peftkit.finetune.tasks.base import BadRow, Encoded, pad, text_of
from peftkit.finetune.tasks.text_contrast import TextContrast

if TYPE_CHECKING:
    import torch

_SIDES = ("anchor", "positive")


class Embeddings(TextContrast):
    """Pairs of texts that belong together. The loss is that of a classifier over the batch.

    Source: Henderson et al., 2017, arXiv:1705.00652; Gao et al., 2021, arXiv:2104.08821 for the temperature.
    """

    name = "embeddings"
    summary = "pairs of texts that belong together; the other rows of the batch are the negatives"
    columns: ClassVar[dict[str, str]] = {
        "anchor": "a text, such as a question",
        "positive": "a text that belongs to it, such as its answer",
    }
    metric_names = ("recall_at_1", "mean_reciprocal_rank")
    best_metric = "mean_reciprocal_rank"
    seq_len = 256

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        features: dict[str, Any] = {}
        length = 0
        for side in _SIDES:
            ids = self.setting.tokenizer(text_of(row, side)).input_ids
            cut = self.setting.tokenizer(
                text_of(row, side), truncation=True, max_length=self.setting.seq_len
            ).input_ids
            if not cut:
                raise BadRow(f"column {side!r} has no token")
            features[side], length = list(cut), max(length, len(ids))
        return [Encoded(features, length, 1)]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Both sides in one batch: ``Int64[2 · rows, length]``, all anchors before all positives."""
        import torch

        texts = [row[side] for side in _SIDES for row in rows]
        return {
            "input_ids": pad(texts, self.setting.tokenizer.pad_token_id),
            "attention_mask": pad([[1] * len(text) for text in texts], 0),
            "labels": torch.arange(len(rows)),
        }

    def render(self, features: dict[str, Any]) -> str:
        decode = self.setting.tokenizer.decode
        return f"«{decode(features['anchor'])}» ~ «{decode(features['positive'])}»"

    def keep_of_logits(self, logits: Any, labels: Any) -> Any:
        """The rank of each anchor's own positive in its batch, from 1."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        own = logits.gather(1, labels[:, None])
        return (logits > own).sum(1) + 1

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        ranks = np.asarray(predictions)
        return {
            "recall_at_1": float(np.mean(ranks == 1)),
            "mean_reciprocal_rank": float(np.mean(1.0 / ranks)),
        }


TASK = Embeddings
