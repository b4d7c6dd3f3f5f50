"""What the tasks with causal language models share: the loader's class, labels, collator and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftkit.errors import ContractError
from peftkit.finetune.logits import change
from peftkit.finetune.packing import collate_packs, pack, require_no_leaks
from peftkit.finetune.tasks.base import IGNORED, Task, marked, pad, pad_tokens
from peftkit.finetune.tasks.scores import token_accuracy
from peftkit.fuse.int8_mode import outliers_in_8_bits

if TYPE_CHECKING:
    import torch


class CausalTask(Task):
    """A task of a causal language model. Rows have ``input_ids`` and ``labels`` of the same length."""

    auto_class = "AutoModelForCausalLM"
    task_type = "CAUSAL_LM"
    metric_names = ("token_accuracy",)
    generative = True

    def packs(self) -> bool:
        return self.setting.options.packing

    def pack(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return pack(rows, self.setting.seq_len)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pad_id = self.setting.tokenizer.pad_token_id
        if "position_ids" in rows[0]:
            return collate_packs(rows, pad_id)
        return pad_tokens(rows, pad_id) | {"labels": pad([r["labels"] for r in rows], IGNORED)}

    def render(self, features: dict[str, Any]) -> str:
        return marked(self.setting.tokenizer, features["input_ids"], features["labels"])

    def check_model(self, model: Any, rows: list[dict[str, Any]]) -> None:
        require_causal(model)
        if self.packs():
            require_no_leaks(model)

    def keep_of_logits(self, logits: Any, labels: Any) -> Any:
        return logits.argmax(-1)

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        return {"token_accuracy": token_accuracy(predictions[:, :-1], labels[:, 1:])}


def require_causal(model: Any, length: int = 8) -> None:
    """Raise unless the logits of a position are the same for any next token. Otherwise the model would learn to copy its labels.

    Args:
        model: A model with logits for each position.
        length: Number of tokens of the text that is tried.

    Raises:
        ContractError: The logits before the last token depend on it.
    """
    import torch

    device = next(model.parameters()).device
    ids = torch.arange(length, device=device)[None] % model.config.get_text_config().vocab_size
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    require_blind_to_last(model, batch, 0)


def require_blind_to_last(model: Any, batch: dict[str, Any], other_id: int) -> None:
    """As ``require_causal``, for a batch of one row without padding.

    Args:
        model: A model with logits for each position.
        batch: Its inputs, with ``input_ids``.
        other_id: The token that the last one is replaced by.

    Raises:
        ContractError: The logits before the last token depend on it.
    """
    import torch

    other = batch["input_ids"].clone()
    other[0, -1] = other_id
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), outliers_in_8_bits(model):
            first, second = (
                model(**{**batch, "input_ids": ids}).logits[0, :-1]
                for ids in (batch["input_ids"], other)
            )
    finally:
        model.train(was_training)
    difference = change(first, second)
    if difference:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        raise ContractError(
            f"{type(base).__name__} attends to the tokens that it should predict (they change its logits by {difference:.3g}), so the "
            "loss would fall without learning; use a decoder such as Llama or GPT-2, or task=masked_lm"
        )
