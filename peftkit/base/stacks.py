"""Put a stack of expert weights into bitsandbytes' 4-bit storage, and write and read it in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized
from torch import Tensor, nn

from peftkit.base.quantize import quantize_stack_nf4, uninitialized_nf4
from peftkit.base.shards import StoredTensor
from peftkit.errors import ContractError
from peftkit.find.stacks import ORDER, packed_stacks

_MARK = ".quant_state.bitsandbytes__nf4"


class PackedParameter(nn.Parameter):
    """The bytes of a stack that was read, until ``attach`` puts them into their module.

    Attributes:
        statistics: The tensors that bitsandbytes keeps beside the bytes, by the ends of their names in a checkpoint.
    """

    statistics: dict[str, Tensor]


def pack(weight: Tensor, name: str) -> PackedParameter:
    """Quantise a stack ``Float[E, N, K]``, a few rows at a time.

    Raises:
        ContractError: It has values that are not finite.
    """
    return _with_statistics(*quantize_stack_nf4(weight, name))


def pack_nothing(weight: Tensor) -> PackedParameter:
    """The tensors of ``pack`` without their values, for a weight that has none."""
    packed, state = uninitialized_nf4(weight, weight.shape)
    with torch.device(
        "cpu"
    ):  # bitsandbytes writes shape and dtype into a tensor, and reads them again
        return _with_statistics(packed, state)


def _with_statistics(packed: Tensor, state: Any) -> PackedParameter:
    parameter = PackedParameter(packed, requires_grad=False)
    parameter.statistics = state.as_dict(packed=True)
    return parameter


def attach(model: nn.Module, name: str, saved: Mapping[str, StoredTensor] | None = None) -> None:
    """Let bitsandbytes decode a stack from its bytes whenever it is read.

    Args:
        model: The model.
        name: The stack's name in the model, which has a ``PackedParameter`` or other bytes there.
        saved: The tensors beside the bytes in a checkpoint; default: those of the ``PackedParameter``.
    """
    parent, _, own = name.rpartition(".")
    module = model.get_submodule(parent)
    parameter: Any = getattr(module, own)
    statistics = (
        parameter.statistics
        if saved is None
        else {end: tensor.read() for end, tensor in saved.items()}
    )
    module.__dict__.setdefault(ORDER, list(module._parameters))
    setattr(module, own, nn.Parameter(parameter.data, requires_grad=False))
    replace_parameter_4bit_prequantized(module, own, statistics, parameter.device)


def save_under_own_names(model: Any) -> None:
    """Let ``save_pretrained`` write stacks as they are. transformers would cut the bytes into the weights of single experts."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    ends = _ends_of_stacks(model)
    model._weight_conversions = [step for step in conversions if not _makes(step, ends)]


def dense_conversions(model: Any) -> list[Any]:
    """Conversions of transformers for a model whose stacks are decoded: its own, and those that ``save_under_own_names`` removed."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    known = get_model_conversion_mapping(model, add_legacy=False)
    own = getattr(model, "_weight_conversions", None)
    if own is None:
        return known
    ends = _ends_of_stacks(model)
    return [
        *(step for step in own if not _makes(step, ends)),
        *(step for step in known if _makes(step, ends)),
    ]


def _ends_of_stacks(model: nn.Module) -> tuple[str, ...]:
    return tuple({f".{name}" for module in model.modules() for name in packed_stacks(module)})


def _makes(step: Any, ends: tuple[str, ...]) -> bool:
    """Whether a conversion makes tensors whose names end like this."""
    from transformers.core_model_loading import WeightConverter

    targets = step.target_patterns if isinstance(step, WeightConverter) else ()
    return any(f".{target}".endswith(ends) for target in targets)


def take_saved(tensors: dict[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Remove from the tensors of a checkpoint those that bitsandbytes keeps beside the bytes of its stacks.

    Args:
        tensors: All tensors of a checkpoint that bitsandbytes has quantised, by name; changed.

    Returns:
        For each stack by its name in the checkpoint the removed tensors, by the ends of their names.
    """
    marked = [name.removesuffix(_MARK) for name in tensors if name.endswith(_MARK)]
    stacks = [name for name in marked if name.rpartition(".")[2] != "weight"]
    return {
        name: {
            full.removeprefix(f"{name}."): tensors.pop(full)
            for full in [other for other in tensors if other.startswith(f"{name}.")]
        }
        for name in stacks
    }


def make_room(
    model: Any, saved: Mapping[str, dict[str, StoredTensor]]
) -> dict[str, dict[str, StoredTensor]]:
    """Replace the stacks of a model on the device meta by parameters for their bytes.

    Returns:
        ``saved`` by the names in the model.

    Raises:
        ContractError: The model has no such stack.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    known = {name for name, parameter in model.named_parameters() if parameter.ndim == 3}
    found = {}
    for stored, statistics in saved.items():
        name = stored if stored in known else apply_renamings(stored, renamings)
        if name not in known:
            raise ContractError(
                f"the checkpoint has {stored} in 4 bits, and {type(model).__name__} has no stack of experts of this name; the config belongs "
                "to another checkpoint"
            )
        parent, _, own = name.rpartition(".")
        module = model.get_submodule(parent)
        size = (-(-getattr(module, own).numel() // 2), 1)
        room = torch.empty(size, dtype=torch.uint8, device="meta")
        setattr(module, own, nn.Parameter(room, requires_grad=False))
        found[name] = statistics
    return found
