"""How far a student is from its teacher, summed over the outputs that have a label."""

from __future__ import annotations

from typing import Literal

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
