"""How far a student is from its teacher, summed over the outputs that have a label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from peftkit.errors import ContractError
from peftkit.finetune.tasks.base import IGNORED


def labelled(labels: Tensor, positions: Literal["next", "same"]) -> Tensor:
    """The outputs that have a label: ``Bool[*labels.shape]``.

    Args:
        labels: ``Int64[rows, length]``, or ``Int64[rows]`` for one output a row. -100 is no label; padding has it.
        positions: ``"next"``: the output of a position is compared with the label of the next one. ``"same"``: with its own.
    """
    used = labels != IGNORED
    if positions == "same":
        return used
    return F.pad(used[..., 1:], (0, 1), value=False)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T² Σ KL(softmax(teacher / T) ‖ softmax(student / T))``, in float32.

    ``T²`` keeps the size of the gradients, which softening divides by ``T²``.

    Args:
        student: ``Float[N, V]`` logits.
        teacher: ``Float[N, V']`` logits. If the sizes differ, the columns that only one of them has do not take part.
        temperature: ``T``.

    Source: Hinton et al., 2015, arXiv:1503.02531, section 2.
    """
    size = min(student.shape[-1], teacher.shape[-1])
    wanted = F.log_softmax(teacher[:, :size].float() / temperature, dim=-1)
    found = F.log_softmax(student[:, :size].float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(found, wanted, reduction="sum", log_target=True)


def select(logits: Tensor, used: Tensor, whose: str) -> Tensor:
    """The logits of the outputs that have a label: ``Float[N, V]``.

    Args:
        logits: ``Float[*used.shape, V]``.
        used: From ``labelled``.
        whose: ``"student"`` or ``"teacher"``, for the message.

    Raises:
        ContractError: The model has other outputs than one for each label.
    """
    if logits.shape[:-1] != used.shape:
        raise ContractError(
            f"distill: the logits of the {whose} have the shape {list(logits.shape)}, but the labels have {list(used.shape)}; a model with "
            "one output for each label is needed"
        )
    return logits[used.to(logits.device)]


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], shares: Tensor) -> Tensor:
    """The mean squared difference of hidden states, averaged over the student's layers and summed over tokens, in float32.

    Layer ``i`` of ``n`` is compared with layer ``⌈i m / n⌉`` of the teacher's ``m``, so the last one with the last one.

    Args:
        student: ``Float[rows, length, D]`` of the embeddings and of each layer. The embeddings are not compared.
        teacher: The same of the teacher.
        shares: ``Float[rows, length]``, how much each token counts; 0 for those that do not.

    Raises:
        ContractError: The widths differ.

    Source: Jiao et al., 2020, arXiv:1909.10351, with equal widths.
    """
    if student[-1].shape != teacher[-1].shape:
        raise ContractError(
            f"distill.loss='hidden' compares hidden states of equal shapes, but those of the student are {list(student[-1].shape)} and those of "
            f"the teacher {list(teacher[-1].shape)}; use distill.loss=logits, or a teacher of the same width"
        )
    layers, of_teacher = len(student) - 1, len(teacher) - 1
    total = shares.new_zeros(())
    for number in range(1, layers + 1):
        other = teacher[-(-number * of_teacher // layers)]
        squares = (student[number].float() - other.float()).square().mean(-1)
        # A product with 0 would not remove what is not finite at padding.
        total = total + (squares * shares).masked_fill(shares == 0, 0).sum()
    return total / layers


def token_shares(used: Tensor, batch: dict[str, Any]) -> Tensor:
    """How much each token counts: ``Float[rows, length]``.

    Args:
        used: From ``labelled``: for each token, or for each row. A row's tokens count as one together, without padding.
        batch: The batch, with ``attention_mask`` if ``used`` is for rows.
    """
    if used.ndim == 2:
        return used.float()
    mask = batch["attention_mask"].float()
    return mask / mask.sum(1, keepdim=True) * used[:, None]
