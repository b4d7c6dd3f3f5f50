"""Preferences between two answers, with direct preference optimisation (DPO) by TRL's ``DPOTrainer``."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftkit.errors import ContractError, short
from peftkit.finetune.generative import require_causal
from peftkit.finetune.logits import change
from peftkit.finetune.schema import key
from peftkit.finetune.tasks.base import (
    IGNORED,
    BadRow,
    Encoded,
    marked,
    pad,
    pad_tokens,
    text_of,
)
from peftkit.finetune.tasks.sft import Sft, conversation_of, with_system

if TYPE_CHECKING:
    import torch

    from peftkit.finetune.recipe import Recipe

_SIDES = ("chosen", "rejected")


@dataclass
class Options:
    """Options of ``preference``."""

    beta: float = key(0.1, "How strongly the model is held near the reference", above=0)
    loss: Literal["sigmoid", "hinge", "ipo"] = key(
        "sigmoid", "sigmoid is DPO, hinge is SLiC, ipo is IPO"
    )
    chat_template: str | None = key(
        None, "A file with a Jinja template, instead of the tokenizer's own"
    )
    system: str | None = key(None, "System message of rows without one")


class Preference(Sft):
    """Prompts with a better and a worse answer.

    The reference is the model before training: with an adapter, the model with the adapter disabled; otherwise a second, frozen copy.

    Source: Rafailov et al., 2023, arXiv:2305.18290.
    """

    name = "preference"
    summary = "prompts with a better and a worse answer (DPO, by TRL's DPOTrainer)"
    columns: ClassVar[dict[str, str]] = {
        "prompt": "the request, as text or as a list of messages; optional if chosen has it",
        "chosen": "the better answer, as text, or as the messages of the conversation",
        "rejected": "the worse answer",
    }
    distils = None
    Options = Options
    metric_names = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
    epochs = 1.0
    smooths_labels = False
    lr_share = 0.05

    def packs(self) -> bool:
        return False

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        features: dict[str, Any] = {}
        size, length = self.setting.seq_len, 0
        for side, messages in zip(
            _SIDES, _conversations(row, self.setting.options.system), strict=True
        ):
            ids, labels = self.tokens_of(messages, "last_answer")
            features[f"{side}_ids"] = ids[:size]
            features[f"{side}_mask"] = [int(label != IGNORED) for label in labels[:size]]
            length = max(length, len(ids))
        counts = [sum(features[f"{side}_mask"][1:]) for side in _SIDES]
        if all(counts) and features["chosen_ids"] == features["rejected_ids"]:
            raise BadRow(f"chosen and rejected are the same in the first {size} tokens")
        return [Encoded(features, length, sum(counts) if all(counts) else 0)]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Both answers in one batch: ``Int64[2 · rows, length]``, all chosen ones before all rejected ones."""
        texts = [{"input_ids": row[f"{side}_ids"]} for side in _SIDES for row in rows]
        masks = [row[f"{side}_mask"] for side in _SIDES for row in rows]
        batch = pad_tokens(texts, self.setting.tokenizer.pad_token_id)
        return batch | {"completion_mask": pad(masks, 0)}

    def first_batch(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The answers with labels: the loss of a language model depends on the same weights as that of DPO."""
        batch = self.collate(rows)
        mask = batch.pop("completion_mask")
        return batch | {"labels": batch["input_ids"].masked_fill(mask == 0, IGNORED)}

    def render(self, features: dict[str, Any]) -> str:
        chosen, rejected = (
            marked(
                self.setting.tokenizer,
                features[f"{side}_ids"],
                [0 if used else IGNORED for used in features[f"{side}_mask"]],
            )
            for side in _SIDES
        )
        return f"{chosen} > {rejected}"

    def check_model(self, model: Any, rows: list[dict[str, Any]]) -> None:
        require_causal(model)
        for config in getattr(model, "peft_config", {}).values():
            _check_adapter(config)
        if getattr(model, "peft_config", None):
            _require_reference(model)

    def trainer(self, recipe: Recipe, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        from peftkit.finetune.model import load_model
        from peftkit.finetune.setup import is_adapter

        try:
            from peftkit.finetune.preference_trainer import PreferenceTrainer, make_config
        except ImportError as error:
            raise ContractError(
                f"task=preference needs the package trl: pip install 'peftkit[trl]' ({error})"
            ) from error
        reference = None if is_adapter(recipe) else load_model(recipe, self, is_adapter=False)
        return PreferenceTrainer, {
            "args": make_config(self.setting.options, settings),
            "processing_class": self.setting.tokenizer,
            "reference": reference,
        }

    def prompt(self, row: dict[str, Any]) -> tuple[list[int], str]:
        chosen, _ = _conversations(row, self.setting.options.system)
        return self.prompt_ids(chosen[:-1]), chosen[-1]["content"]


def _check_adapter(config: Any) -> None:
    """Raise if the settings of an adapter contradict DPO."""
    dropout = getattr(config, "lora_dropout", 0.0)
    if dropout:
        raise ContractError(
            f"strategy.lora_dropout={dropout:g} has no effect, because TRL trains preferences without dropout; remove it"
        )
    bias = getattr(config, "bias", "none")
    if bias != "none":
        raise ContractError(
            f"strategy.bias={bias!r} trains biases of the model itself, so the model without the adapter would be no reference; use "
            "bias=none"
        )


def _require_reference(model: Any, length: int = 8) -> None:
    """Raise unless a new adapter changes nothing, because the reference is the model with the adapter disabled."""
    import torch

    device = next(model.parameters()).device
    ids = torch.arange(length, device=device)[None] % model.config.get_text_config().vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            with_adapter = model(**inputs).logits
            with model.disable_adapter():
                without = model(**inputs).logits
    finally:
        model.train(was_training)
    difference = change(without, with_adapter)
    if difference:
        raise ContractError(
            f"the new adapter changes the logits by {difference:.3g} before training, but the reference of task=preference is the model "
            "with the adapter disabled; use an adapter that starts without effect, such as strategy lora with init_lora_weights=true, "
            "bottleneck, or prefix with gate=true"
        )


def _conversations(
    row: dict[str, Any], system: str | None
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The conversations with the chosen and with the rejected answer, which is the last message."""
    given = _messages(row, "prompt", "user") if row.get("prompt") is not None else []
    before, answers = [], []
    for side in _SIDES:
        messages = _messages(row, side, "assistant")
        prompt, answer = messages[:-1] or given, messages[-1]
        if not prompt:
            raise BadRow(
                f"no column 'prompt', and column {side!r} has no message before its answer"
            )
        if given and prompt[-len(given) :] != given:
            raise BadRow(f"the messages before the answer in column {side!r} are not the prompt")
        if answer["role"] != "assistant":
            raise BadRow(
                f"the last message of column {side!r} has the role {answer['role']!r}, not assistant"
            )
        before.append(prompt)
        answers.append(answer)
    if before[0] != before[1]:
        raise BadRow("chosen and rejected answer different prompts")
    if answers[0]["content"] == answers[1]["content"]:
        raise BadRow("chosen and rejected are the same, so there is nothing to prefer")
    if before[0][-1]["role"] == "assistant":
        raise BadRow("the last message of the prompt has the role assistant")
    prompt = before[0] if before[0][0]["role"] == "system" else with_system(before[0], system)
    return [*prompt, answers[0]], [*prompt, answers[1]]


def _messages(row: dict[str, Any], column: str, role: str) -> list[dict[str, str]]:
    """A column as messages; a text is one message with the role ``role``."""
    value = row.get(column)
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        # A text may start like a list.
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, (list, tuple)):
        if not value:
            raise BadRow(f"column {column!r} is empty")
        return conversation_of(value)
    if value is not None and not isinstance(value, str):
        raise BadRow(f"column {column!r} is {short(value)}, neither text nor a list of messages")
    return [{"role": role, "content": text_of(row, column)}]


TASK = Preference
