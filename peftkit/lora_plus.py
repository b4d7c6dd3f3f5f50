"""LoRA+: a larger learning rate for the factor that starts at zero."""

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
    """Parameter groups for any torch optimiser, in which every ``lora_B`` learns ``ratio`` times as fast as ``lora_A``.

    With Trainer, pass the optimiser; its scheduler then scales all groups alike::

        optimizer = torch.optim.AdamW(lora_plus_groups(model, lr=2e-4))
        Trainer(model=model, ..., optimizers=(optimizer, None)).train()

    or, where Trainer should choose the optimiser's class, override ``create_optimizer``::

        class LoraPlusTrainer(Trainer):
            def create_optimizer(self):
                cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
                options.pop("lr")
                self.optimizer = cls(lora_plus_groups(self.model, lr=self.args.learning_rate), **options)
                return self.optimizer

    Args:
        model: A model with LoRA layers of PEFT, fused or not.
        lr: Learning rate of ``lora_A``, and of every other trainable parameter: magnitudes, biases, heads trained as a
            whole, prefixes and bottlenecks.
        ratio: By how much ``lora_B`` learns faster, at least 1. The paper finds values near 16 best, together with a
            somewhat smaller ``lr`` than without.
        weight_decay: Of parameters with two or more axes; vectors (magnitudes, biases, norms) never decay.
        embedding_lr: Learning rate of both factors of LoRA on embeddings; ``None`` treats them as those of linears.

    Returns:
        Groups with ``name``, ``params``, ``lr`` and ``weight_decay``; every trainable parameter is in exactly one, and no
        group is empty.

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
        raise ValueError(f"embedding_lr={embedding_lr} must be positive, or None")
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
            "model has no trainable lora_B: put a LoRA adapter on it first (peftkit.wrap), or call model.set_adapter"
        )
    return list(groups.values())


def _kinds(model: nn.Module) -> dict[int, str]:
    """``lora_B``, ``embedding`` or ``embedding_B`` by the identity of the parameter; what is absent is something else."""
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
