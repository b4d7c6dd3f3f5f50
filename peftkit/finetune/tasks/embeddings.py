"""Text embeddings by in-batch contrast: each text must be closer to its own partner than to those of the other rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from peftkit.errors import ContractError
from peftkit.finetune.schema import key
from peftkit.finetune.tasks.base import BadRow, Encoded, Task, pad, text_of

if TYPE_CHECKING:
    import torch

_SIDES = ("anchor", "positive")


@dataclass
class Options:
    """Options of ``embeddings``."""

    temperature: float = key(0.05, "Similarities are divided by this number", above=0)
    pooling: Literal["mean", "first", "last"] = key(
        "mean", "How the outputs of the tokens become one vector"
    )


class Embeddings(Task):
    """Pairs of texts that belong together. The loss is that of a classifier over the batch.

    Source: Henderson et al., 2017, arXiv:1705.00652; Gao et al., 2021, arXiv:2104.08821 for the temperature.
    """

    name = "embeddings"
    summary = "pairs of texts that belong together; the other rows of the batch are the negatives"
    auto_class = "AutoModel"
    task_type = "FEATURE_EXTRACTION"
    columns: ClassVar[dict[str, str]] = {
        "anchor": "a text, such as a question",
        "positive": "a text that belongs to it, such as its answer",
    }
    Options = Options
    metric_names = ("recall_at_1", "mean_reciprocal_rank")
    best_metric = "mean_reciprocal_rank"
    has_own_loss = True
    smooths_labels = False
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

    def outside_loss(self, model: Any) -> list[str]:
        return ["pooler.dense"] if hasattr(getattr(model, "pooler", None), "dense") else []

    def check_model(self, model: Any, rows: list[dict[str, Any]]) -> None:
        if model.config.is_encoder_decoder:
            raise ContractError(
                f"task=embeddings needs an encoder or a decoder, and {type(model).__name__} is both; use a model such as BERT or MiniLM"
            )
        if len(rows) < 2:
            raise ContractError(
                f"task=embeddings compares the rows of a batch, but a batch has {len(rows)}; use training.batch_size=16 or more, and "
                "enough rows"
            )

    def loss(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
        import torch

        inputs = dict(inputs)
        labels = inputs.pop("labels")
        states = model(**inputs).last_hidden_state
        vectors = self._pooled(states.float(), inputs["attention_mask"])
        vectors = torch.nn.functional.normalize(vectors, dim=-1)
        anchors, positives = vectors.chunk(2)
        scores = anchors @ positives.T / self.setting.options.temperature
        if scores.shape[0] == 1:
            # One row has no negatives: its loss is 0, and so are the gradients.
            return scores.sum() * 0.0, {"loss": None, "logits": scores}
        loss = torch.nn.functional.cross_entropy(scores, labels)
        return loss, {"loss": loss, "logits": scores}

    def _pooled(self, states: Any, mask: Any) -> Any:
        """One vector for each text: ``Float32[texts, width]``."""
        if self.setting.options.pooling == "first":
            return states[:, 0]
        if self.setting.options.pooling == "last":
            last = mask.sum(1) - 1
            return states[range(len(states)), last]
        weights = mask[..., None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)

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
