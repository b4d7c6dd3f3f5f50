"""Text embeddings without labels: the same text twice through dropout must be closer than two different texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from peftkit.errors import ContractError
from peftkit.finetune.contrast import (
    CHUNK,
    batch_loss,
    in_chunks,
    pooled,
    require_batch,
    require_one_encoder,
    unused_pooler,
)
from peftkit.finetune.schema import key
from peftkit.finetune.tasks.base import BadRow, Encoded, Task, pad_tokens, text_of

if TYPE_CHECKING:
    import torch


@dataclass
class Options:
    """Options of ``contrastive``."""

    temperature: float = key(0.05, "Similarities are divided by this number", above=0)
    pooling: Literal["mean", "first", "last"] = key(
        "mean", "How the outputs of the tokens become one vector"
    )
    chunk: int | None = key(None, CHUNK, least=1)


class Contrastive(Task):
    """Plain texts. The partner of a text is the same text with another dropout mask; the other texts of the batch are the negatives.

    Evaluation has no dropout, so its loss measures only how far different texts are apart.

    Source: Gao et al., 2021, arXiv:2104.08821, section 3 (unsupervised SimCSE).
    """

    name = "contrastive"
    summary = (
        "plain texts; the same text twice through dropout, against the other texts of the batch"
    )
    auto_class = "AutoModel"
    task_type = "FEATURE_EXTRACTION"
    columns: ClassVar[dict[str, str]] = {"text": "the text"}
    Options = Options
    has_own_loss = True
    seq_len = 128
    epochs = 1.0

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        text = text_of(row, "text")
        length = len(self.setting.tokenizer(text).input_ids)
        cut = self.setting.tokenizer(
            text, truncation=True, max_length=self.setting.seq_len
        ).input_ids
        if not cut:
            raise BadRow("column 'text' has no token")
        return [Encoded({"input_ids": list(cut)}, length, 1)]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Each text twice: ``Int64[2 · rows, length]``, all texts before their copies."""
        import torch

        batch = pad_tokens([*rows, *rows], self.setting.tokenizer.pad_token_id)
        return batch | {"labels": torch.arange(len(rows))}

    def render(self, features: dict[str, Any]) -> str:
        return f"«{self.setting.tokenizer.decode(features['input_ids'])}»"

    def outside_loss(self, model: Any) -> list[str]:
        return unused_pooler(model)

    def check_model(self, model: Any, rows: list[dict[str, Any]]) -> None:
        require_one_encoder(model, self.name)
        require_batch(rows, self.name)
        if not _has_dropout(model):
            raise ContractError(
                f"task=contrastive needs dropout, by which a text differs from itself, and {type(model).__name__} has none; set "
                "strategy.lora_dropout=0.1 with strategy lora, or use task=embeddings with pairs of texts"
            )

    def loss(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
        options = self.setting.options
        batch = {name: tensor for name, tensor in inputs.items() if name != "labels"}

        def encode(part: dict[str, Any]) -> Any:
            states = model(**part).last_hidden_state
            return pooled(states, part["attention_mask"], options.pooling)

        vectors = in_chunks(encode, batch, options.chunk)
        loss, scores = batch_loss(vectors, options.temperature)
        return loss, {"loss": loss, "logits": scores}


def _has_dropout(model: Any) -> bool:
    """Whether some dropout layer, or a rate in the config, is above zero."""
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        return True
    rates = model.config.to_dict().items()
    return any("drop" in name and isinstance(rate, float) and rate > 0 for name, rate in rates)


TASK = Contrastive
