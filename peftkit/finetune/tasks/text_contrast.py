"""What the tasks that contrast texts share: options, one vector for each text, and the loss over a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from peftkit.errors import ContractError
from peftkit.finetune.contrast import CHUNK, batch_loss, in_chunks, require_batch, unused_pooler
from peftkit.finetune.schema import key
from peftkit.finetune.tasks.base import Task

if TYPE_CHECKING:
    import torch


@dataclass
class TextContrastOptions:
    """Options of the tasks that contrast texts."""

    temperature: float = key(0.05, "Similarities are divided by this number", above=0)
    pooling: Literal["mean", "first", "last"] = key(
        "mean", "How the outputs of the tokens become one vector"
    )
    chunk: int | None = key(None, CHUNK, least=1)


class TextContrast(Task):
    """A task whose batches have all texts before their partners: ``input_ids`` and ``attention_mask``, ``Int64[2 · rows, length]``."""

    auto_class = "AutoModel"
    task_type = "FEATURE_EXTRACTION"
    Options = TextContrastOptions
    has_own_loss = True

    def outside_loss(self, model: Any, rows: list[dict[str, Any]]) -> list[str]:
        return unused_pooler(model)

    def check_model(self, model: Any, rows: list[dict[str, Any]]) -> None:
        if model.config.is_encoder_decoder:
            raise ContractError(
                f"task={self.name} needs an encoder or a decoder, and {type(model).__name__} is both; use a model such as BERT or "
                "MiniLM"
            )
        require_batch(rows, self.name)

    def loss(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
        options = self.setting.options
        batch = {name: tensor for name, tensor in inputs.items() if name != "labels"}

        def encode(part: dict[str, Any]) -> Any:
            states = model(**part).last_hidden_state
            return pooled(states, part["attention_mask"], options.pooling)

        vectors = in_chunks(encode, batch, options.chunk)
        loss, scores = batch_loss(vectors, options.temperature)
        return loss, {"loss": loss, "logits": scores}


def pooled(states: torch.Tensor, mask: torch.Tensor, how: str) -> torch.Tensor:
    """One vector for each text: ``Float32[texts, width]``.

    Args:
        states: ``Float[texts, length, width]``, the outputs of the last layer.
        mask: ``Int64[texts, length]``, 0 for padding, which is on the right.
        how: ``"mean"``, ``"first"`` or ``"last"``.
    """
    states = states.float()
    if how == "first":
        return states[:, 0]
    if how == "last":
        return states[range(len(states)), mask.sum(1) - 1]
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)
