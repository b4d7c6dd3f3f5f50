"""Parameter groups: learning rates of the body, of new heads, of blocks, and of ``lora_B``."""

from __future__ import annotations

from typing import Any

from torch import nn

from peftkit.errors import ContractError
from peftkit.finetune.blocks import Places


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    head_lr: float,
    weight_decay: float = 0.0,
    layer_decay: float | None = None,
    lora_plus_ratio: float | None = None,
) -> list[dict[str, Any]]:
    """Make parameter groups of every trainable parameter.

    Args:
        model: A model whose trainable parameters have ``requires_grad``.
        lr: Learning rate of what is neither a head nor in a lower block.
        head_lr: Learning rate of the task head.
        weight_decay: Weight decay of parameters with two or more axes.
        layer_decay: The rate of a block is that of the next one times this number; the embeddings' is the lowest. Source: Howard
            and Ruder, 2018, arXiv:1801.06146, section 3.2.
        lora_plus_ratio: The rate of ``lora_B`` divided by ``lr``.

    Returns:
        Groups with ``name``, ``params``, ``lr`` and ``weight_decay``, in an order that depends on the model only.

    Raises:
        ContractError: ``layer_decay`` is given and the model has no blocks, or ``lora_plus_ratio`` and it has no LoRA.
    """
    places = Places(model)
    if layer_decay is not None and not places.stacks:
        raise ContractError(
            f"training.layer_decay={layer_decay:g} needs a model with a list of equal blocks, and {type(model).__name__} has none; "
            "remove it"
        )
    groups: dict[str, dict[str, Any]] = {}
    plus = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate, kind = lr, "body"
        if places.is_head(name):
            rate, kind = head_lr, "head"
        elif layer_decay is not None:
            level = places.level(name)
            rate, kind = lr * layer_decay ** (places.depth + 1 - level), f"level {level}"
        elif lora_plus_ratio is not None and (".lora_B." in name or ".lora_embedding_B." in name):
            rate, kind, plus = lr * lora_plus_ratio, "lora_B", plus + 1
        decays = parameter.ndim > 1
        group = groups.setdefault(
            kind if decays else f"{kind}, no decay",
            {"params": [], "lr": rate, "weight_decay": weight_decay if decays else 0.0},
        )
        group["params"].append(parameter)
    if lora_plus_ratio is not None and not plus:
        raise ContractError(
            f"training.lora_plus_ratio={lora_plus_ratio:g}, but the adapter has no lora_B; remove it"
        )
    return [{"name": name, **group} for name, group in groups.items()]
