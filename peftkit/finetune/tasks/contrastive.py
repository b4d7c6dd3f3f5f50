"""Text embeddings without labels: the same text twice through dropout must be closer than two different texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from peftkit.errors import ContractError
from peftkit.finetune.tasks.base import BadRow, Encoded, pad_tokens, text_of
from peftkit.finetune.tasks.text_contrast import TextContrast

if TYPE_CHECKING:
    import torch


class Contrastive(TextContrast):
    """Plain texts. The partner of a text is the same text with another dropout mask; the other texts of the batch are the negatives.

    Evaluation has no dropout, so its loss measures only how far different texts are apart.

    Source: Gao et al., 2021, arXiv:2104.08821, section 3 (unsupervised SimCSE).
    """

    name = "contrastive"
    summary = (
        "plain texts; the same text twice through dropout, against the other texts of the batch"
    )
    columns: ClassVar[dict[str, str]] = {"text": "the text"}
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

    def check_model(self, model: Any, rows: list[dict[str, Any]]) -> None:
        super().check_model(model, rows)
        if not _has_dropout(model):
            raise ContractError(
                f"task=contrastive needs dropout, by which a text differs from itself, and {type(model).__name__} has none; set "
                "strategy.lora_dropout=0.1 with strategy lora, or use task=embeddings with pairs of texts"
            )


def _has_dropout(model: Any) -> bool:
    """Whether some dropout layer, or a rate in the config, is above zero."""
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        return True
    rates = model.config.to_dict().items()
    return any("drop" in name and isinstance(rate, float) and rate > 0 for name, rate in rates)


TASK = Contrastive
