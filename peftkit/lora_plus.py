"""LoRA+: a larger learning rate for ``lora_B``, the factor that starts at zero."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def lora_plus_groups(
    model: nn.Module,
    *,
    lr: float,
    ratio: float = 16.0,
    weight_decay: float = 0.0,
    embedding_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Make parameter groups for a torch optimiser, in which ``lora_B`` has ``ratio`` times the learning rate of ``lora_A``.

    With Trainer, pass the optimiser. Trainer's scheduler then scales all groups by the same factor::

        optimizer = torch.optim.AdamW(lora_plus_groups(model, lr=2e-4))
        Trainer(model=model, ..., optimizers=(optimizer, None)).train()

    If Trainer should choose the class of the optimiser, override ``create_optimizer``::

        class LoraPlusTrainer(Trainer):
            def create_optimizer(self):
                cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
                options.pop("lr")
                self.optimizer = cls(lora_plus_groups(self.model, lr=self.args.learning_rate), **options)
                return self.optimizer

    Args:
        model: A model with LoRA layers of PEFT, fused or not.
        lr: Learning rate of ``lora_A`` and of every other trainable parameter: magnitudes, biases, heads trained in full,
            prefixes and bottlenecks.
        ratio: Learning rate of ``lora_B`` divided by ``lr``; at least 1. In the paper values near 16 are best, together with
            a somewhat smaller ``lr`` than plain LoRA's.
        weight_decay: Weight decay of parameters with two or more axes. Vectors (magnitudes, biases, norms) have none.
        embedding_lr: Learning rate of both factors of LoRA on embeddings. ``None`` uses the same rates as for linear layers.

    Returns:
        Groups with ``name``, ``params``, ``lr`` and ``weight_decay``. Every trainable parameter is in exactly one group, and
        no group is empty.

    Raises:
        ValueError: A number is out of range, or the model has no trainable ``lora_B``.

    Source: Hayou et al., 2024, arXiv:2402.12354.
    """
    if not lr > 0:
        raise ValueError(f"lr={lr} must be positive")
    if not ratio >= 1:
        raise ValueError(f"ratio={ratio} must be at least 1; ratio=1 is plain LoRA")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay} must not be negative; pass 0 for none")
    if embedding_lr is not None and not embedding_lr > 0:
        raise ValueError(f"embedding_lr={embedding_lr} must be positive or None")
    kinds = _kinds(model)
    rates = {"other": lr, "lora_B": lr * ratio}
    rates |= {"embedding": lr, "embedding_B": lr * ratio}
    if embedding_lr is not None:
        rates |= {"embedding": embedding_lr, "embedding_B": embedding_lr}
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        kind, decays = kinds.get(id(parameter), "other"), parameter.ndim > 1
        group = groups.setdefault(
            (kind, decays),
            {
                "name": kind if decays else f"{kind}, no decay",
                "params": [],
                "lr": rates[kind],
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    if not any(kind in ("lora_B", "embedding_B") for kind, _ in groups):
        raise ValueError(
            "the model has no trainable lora_B; add a LoRA adapter first (peftkit.wrap), or activate one with model.set_adapter"
        )
    return list(groups.values())


def _kinds(model: nn.Module) -> dict[int, str]:
    """Return ``lora_B``, ``embedding`` or ``embedding_B`` by the ``id`` of the parameter. Other parameters are absent."""
    from peft.tuners.lora import LoraLayer

    kinds: dict[int, str] = {}

    def mark(parameters: Iterable[nn.Parameter], kind: str) -> None:
        kinds.update((id(parameter), kind) for parameter in parameters)

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            mark(layer.lora_B.parameters(), "lora_B")
            mark(layer.lora_embedding_A.parameters(), "embedding")
            mark(layer.lora_embedding_B.parameters(), "embedding_B")
    return kinds
