"""The layers of an adapter that can start from their base weight, and why the others cannot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftkit.errors import ContractError, listing
from peftkit.find.modules import wrapped_modules
from peftkit.inits.weights import BaseWeight


class Target:
    """One linear layer with a LoRA adapter.

    Attributes:
        weight: The base weight.
        rank: ``R``.
        scale: The factor of the adapter.
    """

    def __init__(self, layer: Any, adapter_name: str):
        """Check that base weight and adapter can be read.

        Raises:
            ValueError: They cannot; the message says why, without naming the layer.
        """
        A, B = (getattr(layer, name)[adapter_name] for name in ("lora_A", "lora_B"))
        if not isinstance(A, nn.Linear) or not isinstance(B, nn.Linear):
            raise ValueError("its factors are not those of a linear layer")
        self.weight = BaseWeight(layer.get_base_layer())
        self.rank: int = layer.r[adapter_name]
        self.scale: float = layer.scaling[adapter_name]
        self._A, self._B = A.weight, B.weight
        magnitudes = layer.lora_magnitude_vector
        self._magnitude = magnitudes[adapter_name].weight if adapter_name in magnitudes else None

    @property
    def B(self) -> Tensor:  # noqa: N802 - the name of the factor
        """``[N, R]``"""
        return self._B.detach()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the weight in checkpoints."""
        return self.weight.shape[::-1] if self.weight.transposed else self.weight.shape

    def set_factors(self, A: Tensor, B: Tensor) -> None:
        """Set the factors. A rank above that of the weight is filled with zeros, as far as the other factor lets it learn.

        Args:
            A: ``Float32[at most R, K]``.
            B: ``Float32[N, as A]``.
        """
        found = len(A)
        self._A.data[:found].copy_(A)
        self._B.data[:, :found].copy_(B)
        self._B.data[:, found:].zero_()

    def update(self) -> Tensor:
        """``Float32[N, K]``: ``scale · B A`` of the factors as they are stored."""
        return self.scale * (self._B.detach().float() @ self._A.detach().float())

    def set_magnitude(self, weight: Tensor) -> None:
        """Set the magnitude of DoRA to the norms of the rows of ``weight [N, K]``; nothing for other adapters."""
        if self._magnitude is not None:
            norms = torch.linalg.vector_norm(weight, dim=1)
            self._magnitude.data.copy_(norms.view(self._magnitude.shape))


def targets_of(
    model: nn.Module, adapter_name: str, *, replaces_weights: bool
) -> tuple[dict[str, Target], dict[str, str]]:
    """Find the layers of an adapter.

    Args:
        model: A model with adapters.
        adapter_name: The adapter.
        replaces_weights: Whether the base weights will be replaced, so that no other adapter may use them.

    Returns:
        The layers by the names that they have without adapters, and the reason for each adapter layer that cannot be initialised.

    Raises:
        ContractError: Adapters are merged, or another adapter uses a base weight that will be replaced.
    """
    targets: dict[str, Target] = {}
    left: dict[str, str] = {}
    shared = []
    for name, outer, _ in wrapped_modules(model):
        layer: Any = outer
        held = [getattr(layer, own, {}) for own in ("lora_A", "lora_embedding_A")]
        if not any(adapter_name in names for names in held):
            continue
        if layer.merged:
            raise ContractError(
                f"adapters of {name} are merged; call model.unmerge_adapter() first"
            )
        try:
            reason = _variant(layer, adapter_name)
            if reason is not None:
                raise ValueError(reason)
            if adapter_name not in held[0]:
                raise ValueError("it is an embedding")
            targets[name] = Target(layer, adapter_name)
        except ValueError as error:
            left[name] = str(error)
            continue
        if len(held[0]) > 1:
            shared.append(
                f"{name}: {', '.join(other for other in held[0] if other != adapter_name)}"
            )
    if shared and replaces_weights:
        raise ContractError(
            f"{len(shared)} layers have other adapters, which need the base weights as they are:\n{listing(shared)}\n"
            "Delete them, or initialise the adapter on a model without others."
        )
    return targets, left


def _variant(layer: Any, adapter_name: str) -> str | None:
    """Why the adapter is no plain LoRA or DoRA."""
    variant = layer.lora_variant.get(adapter_name)
    if variant is None or type(variant).__name__ == "DoraLinearVariant":
        return None
    return f"its adapter is of the kind {type(variant).__name__}"
