"""Continued training of a masked language model on texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.errors import ContractError
from peftkit.finetune.schema import key
from peftkit.finetune.tasks.base import (
    IGNORED,
    Encoded,
    Setting,
    Task,
    pad,
    pad_tokens,
    text_of,
)
from peftkit.finetune.tasks.scores import token_accuracy

if TYPE_CHECKING:
    import torch


@dataclass
class Options:
    """Options of ``masked_lm``."""

    mask_share: float = key(0.15, "Share of the tokens that the model must guess", above=0, below=1)
    whole_word: bool = key(
        False, "Hide all tokens of a word together, as the tokenizer splits words"
    )


class MaskedLm(Task):
    """Plain texts with hidden tokens: 80 % masked, 10 % replaced, 10 % kept (Devlin et al., 2018, arXiv:1810.04805)."""

    name = "masked_lm"
    summary = "plain texts with hidden tokens, for BERT and its relatives. Long texts are split"
    auto_class = "AutoModelForMaskedLM"
    columns: ClassVar[dict[str, str]] = {"text": "the text"}
    Options = Options
    metric_names = ("token_accuracy",)
    epochs = 1.0
    distils = "same"

    def __init__(self, setting: Setting):
        super().__init__(setting)
        if setting.tokenizer.mask_token_id is None:
            raise ContractError(
                "task=masked_lm needs a tokenizer with a mask token, and this one has none; use task=causal_lm for decoders"
            )
        if setting.options.whole_word and len({*setting.tokenizer("a b c d").word_ids()}) < 4:
            raise ContractError(
                "task.whole_word=true, but the tokenizer does not split texts into words before it makes tokens; set "
                "task.whole_word=false"
            )

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        found = self.setting.tokenizer(
            text_of(row, "text"),
            truncation=True,
            max_length=self.setting.seq_len,
            return_overflowing_tokens=True,
        )
        rows = []
        for number, part in enumerate(found.input_ids):
            features = {"input_ids": list(part)}
            if self.setting.options.whole_word:
                words = found.word_ids(number)
                features["words"] = [-1 if word is None else word for word in words]
            rows.append(Encoded(features, len(part), len(part)))
        return rows

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        tokenizer = self.setting.tokenizer
        batch = pad_tokens(rows, tokenizer.pad_token_id)
        ids, labels = batch["input_ids"], batch["input_ids"].clone()
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids)) | (
            batch["attention_mask"] == 0
        )
        share, draws = self.setting.options.mask_share, self.draws(rows)
        words = pad([row["words"] for row in rows], -1) if "words" in rows[0] else None
        if words is None:
            hidden = torch.rand(ids.shape, generator=draws) < share
        else:
            # One draw for each word, so the expected share of tokens is the same.
            by_word = torch.rand(len(rows), int(words.max()) + 1, generator=draws) < share
            hidden = by_word.gather(1, words.clamp(0))
        hidden &= ~special
        if not bool(hidden.any()):
            # A batch without a label would have a loss of NaN.
            places = (~special).nonzero()
            place = int(torch.randint(len(places), (), generator=draws))
            row, column = places[place].tolist()
            hidden[row, column] = True
            if words is not None:
                hidden[row] |= (words[row] == words[row, column]) & ~special[row]
        labels[~hidden] = IGNORED
        draw = torch.rand(ids.shape, generator=draws)
        ids[hidden & (draw < 0.8)] = tokenizer.mask_token_id
        replaced = hidden & (draw >= 0.8) & (draw < 0.9)
        ids[replaced] = torch.randint(len(tokenizer), ids.shape, generator=draws)[replaced]
        return batch | {"labels": labels}

    def render(self, features: dict[str, Any]) -> str:
        return self.setting.tokenizer.decode(features["input_ids"])

    def keep_of_logits(self, logits: Any, labels: Any) -> Any:
        return logits.argmax(-1)

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        return {"token_accuracy": token_accuracy(predictions, labels)}


TASK = MaskedLm
