"""Continued training of an encoder-decoder on texts: it writes the spans that were taken out of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.errors import ContractError
from peftkit.finetune.schema import key
from peftkit.finetune.tasks.base import IGNORED, Encoded, Setting, Task, pad, pad_tokens, text_of
from peftkit.finetune.tasks.scores import token_accuracy

if TYPE_CHECKING:
    import torch

_SENTINEL = re.compile(r"<extra_id_(\d+)>")


@dataclass
class Options:
    """Options of ``span_corruption``."""

    corrupted_share: float = key(0.15, "Share of the tokens that is taken out", above=0, below=1)
    mean_span: float = key(3.0, "Mean number of tokens of a span", least=1)


class SpanCorruption(Task):
    """Plain texts. Each span is replaced by a mark, and the target has the marks with the spans behind them.

    Source: Raffel et al., 2019, arXiv:1910.10683, section 3.1.4.
    """

    name = "span_corruption"
    summary = "plain texts with spans taken out, for T5 and its relatives. Long texts are split"
    auto_class = "AutoModelForSeq2SeqLM"
    distils = "same"
    task_type = "SEQ_2_SEQ_LM"
    columns: ClassVar[dict[str, str]] = {"text": "the text"}
    Options = Options
    metric_names = ("token_accuracy",)
    epochs = 1.0

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.marks = _marks(setting.tokenizer)
        if not self.marks:
            raise ContractError(
                "task=span_corruption needs a tokenizer with the tokens <extra_id_0>, <extra_id_1>, ..., as T5 has them; use "
                "task=masked_lm for encoders and task=causal_lm for decoders"
            )

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        tokenizer, size = self.setting.tokenizer, self.setting.seq_len
        ids = list(tokenizer(text_of(row, "text"), add_special_tokens=False).input_ids)
        parts = [ids[start : start + size] for start in range(0, len(ids), size)]
        # A text of one token would leave nothing to read.
        return [
            Encoded({"input_ids": part}, len(part), len(part)) for part in parts if len(part) > 1
        ]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Take other spans out of the texts each time."""
        options, end = self.setting.options, self.setting.tokenizer.eos_token_id
        sources, targets, draws = [], [], self.draws(rows)
        for row in rows:
            source, target = corrupt(
                row["input_ids"], self.marks, options.corrupted_share, options.mean_span, draws
            )
            sources.append({"input_ids": [*source, *([] if end is None else [end])]})
            targets.append([*target, *([] if end is None else [end])])
        batch = pad_tokens(sources, self.setting.tokenizer.pad_token_id)
        return batch | {"labels": pad(targets, IGNORED)}

    def render(self, features: dict[str, Any]) -> str:
        return self.setting.tokenizer.decode(features["input_ids"])

    def check_model(self, model: Any, rows: list[dict[str, Any]]) -> None:
        embedded = model.get_input_embeddings().num_embeddings
        if max(self.marks) >= embedded:
            raise ContractError(
                f"task=span_corruption: the mark <extra_id_0> has the token id {max(self.marks)}, but the model's embeddings have "
                f"{embedded} rows; use the tokenizer with which the model was trained"
            )

    def keep_of_logits(self, logits: Any, labels: Any) -> Any:
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits.argmax(-1)

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        return {"token_accuracy": token_accuracy(predictions, labels)}


def corrupt(
    ids: list[int], marks: list[int], share: float, mean_span: float, draws: torch.Generator
) -> tuple[list[int], list[int]]:
    """Take random spans out of a text.

    Args:
        ids: Two or more token ids.
        marks: Token ids of the marks, in the order in which they are used.
        share: Share of the tokens that is taken out; at least one is, and at least one stays.
        mean_span: Mean number of tokens of a span.
        draws: The random numbers.

    Returns:
        The text with a mark for each span, and the marks with the spans behind them, with one mark more at the end if there is one.
    """
    out = min(max(round(len(ids) * share), 1), len(ids) - 1)
    stays = len(ids) - out
    spans = max(1, min(round(out / mean_span), out, stays, len(marks)))
    kept, taken = _lengths(stays, spans, draws), _lengths(out, spans, draws)
    source, target, place = [], [], 0
    for mark, before, length in zip(marks, kept, taken, strict=False):
        source += [*ids[place : place + before], mark]
        target += [mark, *ids[place + before : place + before + length]]
        place += before + length
    return source, target + marks[spans : spans + 1]


def _lengths(total: int, parts: int, draws: torch.Generator) -> list[int]:
    """Divide a number into parts of at least 1, each division with the same probability."""
    import torch

    cuts = sorted((torch.randperm(total - 1, generator=draws)[: parts - 1] + 1).tolist())
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def _marks(tokenizer: Any) -> list[int]:
    """The token ids of ``<extra_id_0>``, ``<extra_id_1>``, ..."""
    found = {
        int(m[1]): i for t, i in tokenizer.get_vocab().items() if (m := _SENTINEL.fullmatch(t))
    }
    return [found[number] for number in sorted(found)]


TASK = SpanCorruption
