"""Continued training of a masked language model on texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.errors import ContractError
from peftkit.finetune.schema import key
from peftkit.finetune.tasks.base import IGNORED, Encoded, Setting, Task, pad_tokens, text_of

if TYPE_CHECKING:
    import torch


@dataclass
class Options:
    """Options of ``masked_lm``."""

    mask_share: float = key(0.15, "Share of the tokens that the model must guess", above=0, below=1)


class MaskedLm(Task):
    """Plain texts with hidden tokens: 80 % masked, 10 % replaced, 10 % kept (Devlin et al., 2018, arXiv:1810.04805)."""

    name = "masked_lm"
    summary = "plain texts with hidden tokens, for BERT and its relatives. Long texts are split"
    auto_class = "AutoModelForMaskedLM"
    columns: ClassVar[dict[str, str]] = {"text": "the text"}
    Options = Options
    metric_names = ("token_accuracy",)
    epochs = 1.0

    def __init__(self, setting: Setting):
        super().__init__(setting)
        if setting.tokenizer.mask_token_id is None:
            raise ContractError(
                "task=masked_lm needs a tokenizer with a mask token, and this one has none; use task=causal_lm for decoders"
            )

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        parts = self.setting.tokenizer(
            text_of(row, "text"),
            truncation=True,
            max_length=self.setting.seq_len,
            return_overflowing_tokens=True,
        ).input_ids
        return [Encoded({"input_ids": list(part)}, len(part), len(part)) for part in parts]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        tokenizer = self.setting.tokenizer
        batch = pad_tokens(rows, tokenizer.pad_token_id)
        ids, labels = batch["input_ids"], batch["input_ids"].clone()
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids)) | (
            batch["attention_mask"] == 0
        )
        hidden = (torch.rand(ids.shape) < self.setting.options.mask_share) & ~special
        if not bool(hidden.any()):
            # A batch without a label would have a loss of NaN.
            places = (~special).nonzero()
            hidden[tuple(places[int(torch.randint(len(places), ()))])] = True
        labels[~hidden] = IGNORED
        draw = torch.rand(ids.shape)
        ids[hidden & (draw < 0.8)] = tokenizer.mask_token_id
        replaced = hidden & (draw >= 0.8) & (draw < 0.9)
        ids[replaced] = torch.randint(len(tokenizer), ids.shape)[replaced]
        return batch | {"labels": labels}

    def render(self, features: dict[str, Any]) -> str:
        return self.setting.tokenizer.decode(features["input_ids"])

    def keep_of_logits(self, logits: Any, labels: Any) -> Any:
        return logits.argmax(-1)

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        used = labels != IGNORED
        return {"token_accuracy": float((predictions == labels)[used].mean())}


TASK = MaskedLm
