"""A text in, another text out, with an encoder-decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.errors import ContractError
from peftkit.finetune.schema import key
from peftkit.finetune.tasks.base import IGNORED, Encoded, Task, pad, pad_tokens, text_of
from peftkit.finetune.tasks.scores import token_accuracy

if TYPE_CHECKING:
    import torch


@dataclass
class Options:
    """Options of ``seq2seq``."""

    prefix: str = key("", 'Text before each source, such as "summarize: "')


class Seq2Seq(Task):
    """Sources with targets."""

    name = "seq2seq"
    summary = "texts with target texts, for T5, BART and their relatives"
    auto_class = "AutoModelForSeq2SeqLM"
    task_type = "SEQ_2_SEQ_LM"
    columns: ClassVar[dict[str, str]] = {"source": "the text", "target": "what it becomes"}
    Options = Options
    metric_names = ("token_accuracy",)
    generative = True
    distils = "same"

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        source = self._source(text_of(row, "source"))
        target = list(self.setting.tokenizer(text_target=text_of(row, "target")).input_ids)
        end, size = self.setting.tokenizer.eos_token_id, self.setting.seq_len
        if end is not None and target[-1:] != [end]:
            target.append(end)
        features = {"input_ids": source[:size], "labels": target[:size]}
        return [Encoded(features, max(len(source), len(target)), len(features["labels"]))]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = pad_tokens(rows, self.setting.tokenizer.pad_token_id)
        return batch | {"labels": pad([row["labels"] for row in rows], IGNORED)}

    def render(self, features: dict[str, Any]) -> str:
        decode = self.setting.tokenizer.decode
        return f"{decode(features['input_ids'])} -> «{decode(features['labels'])}»"

    def check_model(self, model: Any, rows: list[dict[str, Any]]) -> None:
        if not model.config.is_encoder_decoder:
            raise ContractError(
                f"task=seq2seq needs an encoder-decoder, and {type(model).__name__} is none; use task=sft for decoders"
            )

    def keep_of_logits(self, logits: Any, labels: Any) -> Any:
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits.argmax(-1)

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        return {"token_accuracy": token_accuracy(predictions, labels)}

    def prompt(self, row: dict[str, Any]) -> tuple[list[int], str]:
        return self.prompt_of_text(text_of(row, "source")), text_of(row, "target")

    def prompt_of_text(self, text: str) -> list[int]:
        return self._source(text)[: self.setting.seq_len]

    def _source(self, text: str) -> list[int]:
        return list(self.setting.tokenizer(self.setting.options.prefix + text).input_ids)


TASK = Seq2Seq
