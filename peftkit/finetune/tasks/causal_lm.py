"""Continued training of a causal language model on texts: the loss is on every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from peftkit.finetune.generative import CausalTask
from peftkit.finetune.schema import key
from peftkit.finetune.tasks.base import Encoded, text_of


@dataclass
class Options:
    """Options of ``causal_lm``."""

    packing: bool = key(False, "Put several texts in one row, without attention between them")


class CausalLm(CausalTask):
    """Plain texts."""

    name = "causal_lm"
    summary = "plain texts; loss on every token. Long texts are split, so none is truncated"
    columns: ClassVar[dict[str, str]] = {"text": "the text"}
    Options = Options
    seq_len = 1024
    distils = "next"
    epochs = 1.0

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        tokenizer, size = self.setting.tokenizer, self.setting.seq_len
        ids = list(tokenizer(text_of(row, "text")).input_ids)
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        parts = [ids[start : start + size] for start in range(0, len(ids), size)]
        if len(parts) > 1 and len(parts[-1]) == 1:
            # A part of one token has no label after the shift, so the part before it gives it one of its own.
            parts[-2:] = [parts[-2][:-1], parts[-2][-1:] + parts[-1]]
        return [
            Encoded({"input_ids": part, "labels": list(part)}, len(part), len(part) - 1)
            for part in parts
        ]

    def prompt(self, row: dict[str, Any]) -> tuple[list[int], str]:
        text = text_of(row, "text")
        middle = text.find(" ", len(text) // 2)
        middle = len(text) // 2 if middle < 0 else middle
        return self.prompt_of_text(text[:middle]), text[middle:]

    def prompt_of_text(self, text: str) -> list[int]:
        ids = list(self.setting.tokenizer(text).input_ids)
        end = self.setting.tokenizer.eos_token_id
        return ids[:-1] if len(ids) > 1 and ids[-1] == end else ids


TASK = CausalLm
