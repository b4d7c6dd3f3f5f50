"""Merge-aware tuning: LoRA layers whose base and update are quantised together in every forward, as a merge will store them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from torch import Tensor, nn

from peftkit.errors import ContractError, listing
from peftkit.find.modules import is_own_adapter
from peftkit.fuse.int8_mode import int8_mode_of, set_int8_mode_of
from peftkit.fuse.plan import NotReached, Reason
from peftkit_kernels.core.dispatch import is_transformed
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.storage.int8 import Int8ComputeWeight
from peftkit_kernels.storage.nf4 import NF4Weight
from peftkit_kernels.storage.requantized import RequantizedWeight
from peftkit_kernels.storage.requantized.weight import Into

MergeInto = Into
_ATTRIBUTE = "_peftkit_merge_into"
_BLOCKSIZE = 64
"""The blocks of bitsandbytes' 4-bit linears by default."""


def set_merge_into(model: nn.Module, into: MergeInto | None) -> None:
    """Let every LoRA layer compute with the weight that a merge will store; ``None`` keeps the choice of the other layers of the model.

    Args:
        model: A model whose layers are fused.
        into: ``"nf4"``, ``"int8"`` or ``None``.

    Raises:
        ContractError: ``into`` is unknown, the model has no LoRA layer, or an adapter cannot be merged in this way.
    """
    if into is None:
        chosen: list[MergeInto] = [
            found for module in model.modules() if (found := merge_into_of(module)) is not None
        ]
        into = chosen[0] if chosen else None
        if into is None:
            return
    if into not in get_args(Into):
        known = ", ".join(map(repr, get_args(Into)))
        raise ContractError(f"merge_into={into!r} is unknown; use one of {known}, or None")
    layers = dict(_adapter_layers(model))
    if not layers:
        raise ContractError(
            f"merge_into={into!r}, but the model has no adapter layer; add a LoRA adapter, or leave merge_into out"
        )
    refused = []
    for name, layer in layers.items():
        layer.__dict__[_ATTRIBUTE] = into
        reason = _obstacle(layer, into)
        if reason is not None:
            refused.append(f"{name}: {reason}")
    if refused:
        raise ContractError(
            f"merge_into={into!r} is not possible for {len(refused)} of {len(layers)} adapter layers:\n{listing(refused)}\n"
            "Change the config, or leave merge_into out and let the merge round the weights."
        )


def merge_into_of(layer: Any) -> MergeInto | None:
    """The format that was chosen for a layer, or ``None``."""
    return layer.__dict__.get(_ATTRIBUTE)


def forget_merge_into(module: nn.Module) -> None:
    """Remove the choice from a module."""
    module.__dict__.pop(_ATTRIBUTE, None)


def merged_weight(
    into: MergeInto, found: Any, weight: Any, lora: LoRA
) -> RequantizedWeight | Reason:
    """The weight that a merge of this adapter will store, or why a merge is not what the layer computes.

    Args:
        into: The format.
        found: The modules of the adapter.
        weight: The base weight.
        lora: The adapter.
    """
    if is_transformed():
        return Reason("torch.compile and torch.func cannot trace a merged weight")
    if found.magnitude is not None:
        return Reason(
            "DoRA scales rows of the weight; merge_into computes LoRA only (use_dora=False)"
        )
    if getattr(found.dropout, "p", 0.0):
        return Reason(
            f"lora_dropout={found.dropout.p} drops inputs of the adapter only, which a merged weight cannot do; use lora_dropout=0"
        )
    if isinstance(weight, Int8ComputeWeight):
        return Reason(
            'its weight is multiplied in 8 bits (int8_mode="compute"); merge_into needs int8_mode="weight-only" or None'
        )
    stored = "nf4" if isinstance(weight, NF4Weight) else "int8"
    if not isinstance(weight, Tensor) and stored != into:
        return Reason(f'its base is stored as {stored}; use merge_into="{stored}"')
    if isinstance(weight, Tensor) and weight is not found.base._parameters["weight"]:
        return Reason("its base layer is a Conv1D, which bitsandbytes does not quantise")
    blocksize = weight.blocksize if isinstance(weight, NF4Weight) else _BLOCKSIZE
    if into == "nf4" and weight.shape[1] % blocksize:
        return Reason(
            f"its {weight.shape[1]} columns are no multiple of the block size {blocksize}, and on the CPU bitsandbytes does not "
            "decode such a weight as it was quantised; exclude the layer"
        )
    return RequantizedWeight.merging(weight, lora, into)


def require_merged(layer: Any, reason: Reason) -> None:
    """Raise an error if PEFT's forward, which adds the adapter unquantised, would train a layer with a format.

    Raises:
        ContractError: The reason is not that the layer has no active adapter, or one that is disabled or merged.
    """
    into = merge_into_of(layer)
    if into is None or isinstance(reason, NotReached):
        return
    if layer.disable_adapters or layer.merged:
        return
    raise ContractError(
        f"merge_into={into!r}, but a {type(layer).__name__} of {layer.in_features} to {layer.out_features} features would compute its "
        f"adapter without rounding: {reason}. Remove the cause, or call restore(model) and accelerate(model) to give up merge_into."
    )


def _obstacle(layer: Any, into: MergeInto) -> str | None:
    """Why a layer cannot be trained for this format; for 8-bit bases the choice of decoded products is made here."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    from peftkit.fuse.adapter import class_reason
    from peftkit.fuse.linear import FusedLoRA

    if not isinstance(layer, FusedLoRA):
        reason = class_reason(layer) if isinstance(layer, BaseTunerLayer) else None
        return reason or f"a {type(layer).__name__} cannot be merged into a quantised linear"
    base: Any = layer.get_base_layer()
    if type(base).__name__ == "Linear8bitLt" and int8_mode_of(base) is None:
        set_int8_mode_of(base, "weight-only")
    plan = layer.peftkit_plan(layer.peftkit_example())
    if not isinstance(plan, Reason) or isinstance(plan, NotReached):
        return None
    state: Any = layer
    return None if state.disable_adapters else plan


def _adapter_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with adapters, of any method, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    module: Any
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) or is_own_adapter(module):
            yield name, module
