"""Start a new adapter from one that was trained for another task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.errors import ContractError, count, listing
from peftkit.find.heads import find_heads, outside_backbone
from peftkit.finetune.recipe import Choice

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SAME_BASE = (True, False, "gaussian", "orthogonal")
"""Initialisations of LoRA that leave the weights of the base model as they are."""


def require_startable(strategy: Choice, what: str) -> None:
    """Raise unless adapters of a strategy can be trained further on the unchanged base model.

    Args:
        strategy: The strategy.
        what: The key that asks for it, for the message.

    Raises:
        ContractError: The initialisation of LoRA changes the base model.
    """
    config = strategy.options.lora if strategy.name == "mix" else strategy.options
    init = getattr(config, "init_lora_weights", True)
    if init not in _SAME_BASE:
        raise ContractError(
            f"{what}: strategy.init_lora_weights={init!r} changes the weights of the base model, so a trained adapter would not fit the base "
            "model that it makes; merge the adapter first (carry: merge), or use another initialisation"
        )


def start_from_adapter(model: Any, folder: str, labels: list[str]) -> list[str]:
    """Replace the values of a new adapter by those of a trained one, except for a head with other labels.

    Tensors are found by the names of their modules inside the backbone, so the two models may have different heads.

    Args:
        model: A ``PeftModel`` with one adapter.
        folder: Folder of the trained adapter.
        labels: The classes of the new task. The head is kept if the run of the trained adapter had the same ones.

    Returns:
        Notes on what is new and what was left behind.

    Raises:
        ContractError: The folder has no adapter, or it fits the model in no tensor or in another shape.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    file = Path(folder) / _WEIGHTS
    if not file.is_file():
        raise ContractError(
            f"adapter={folder!r} has no {_WEIGHTS}; name the folder adapter/ of a finished run with the same strategy"
        )
    base = model.get_base_model()
    inner = _names(load_file(file), base)
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    heads = _head_names(model)
    keeps_head = bool(labels) and labels == _labels_of(Path(folder))
    found, new, odd = {}, [], []
    for name, own in _names(wanted, base).items():
        is_head = any(name == head or name.startswith(f"{head}.") for head in heads)
        tensor = inner.pop(name, None)
        if tensor is None or (is_head and not keeps_head):
            new.append(name)
        elif tensor.shape != own.shape:
            odd.append(f"{name}: {list(tensor.shape)} in the adapter, {list(own.shape)} now")
        else:
            found[name] = tensor
    if odd or not found:
        raise ContractError(
            f"adapter={folder!r} does not fit {type(base).__name__} with this strategy: "
            + (f"other shapes\n{listing(odd)}" if odd else "no tensor has the same name")
            + "\nUse the strategy and the options with which it was trained."
        )
    back = {_own_name(name, base): name for name in wanted}
    state = {back[name]: tensor for name, tensor in found.items()}
    set_peft_model_state_dict(model, wanted | state)
    notes = [f"{count(len(found), 'tensor')} of the adapter carried over"]
    if new:
        notes.append(f"new: {_few(new)}")
    if inner:
        notes.append(f"left behind: {_few(list(inner))}")
    return notes


def copy_body(source: nn.Module, target: nn.Module) -> None:
    """Copy the weights of one model into another by their names inside the backbone, without heads.

    Args:
        source: A model of the same architecture, perhaps with another head.
        target: Is changed in place.

    Raises:
        ContractError: A weight of the target's backbone, other than a pooler's, is not in the source.
    """
    inner = _names(dict(source.named_parameters()), source)
    head = outside_backbone(dict(target.named_modules()))
    lost = []
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            tensor = inner.get(_own_name(name, target))
            if tensor is not None and tensor.shape == parameter.shape:
                parameter.copy_(tensor)
            elif name.rpartition(".")[0] not in head and "pooler" not in name:
                lost.append(name)
    if lost:
        raise ContractError(
            f"{type(source).__name__} has no such weights of {type(target).__name__}:\n{listing(lost)}\nUse models of one architecture, "
            "and a base that is not quantised."
        )


def _names(tensors: dict[str, Tensor], base: Any) -> dict[str, Tensor]:
    return {_own_name(name, base): tensor for name, tensor in tensors.items()}


def _own_name(name: str, base: Any) -> str:
    """The name of a tensor inside the backbone: without what PEFT and the class with the head put before it."""
    name = name.removeprefix(_PREFIX)
    prefix = getattr(base, "base_model_prefix", "")
    return name.removeprefix(f"{prefix}.") if prefix else name


def _head_names(model: Any) -> list[str]:
    base = model.get_base_model()
    found = find_heads(model)
    return [_own_name(name, base) for name in (*found.names, *found.out_of_reach)]


def _labels_of(folder: Path) -> list[str] | None:
    """The classes of the run that wrote an adapter."""
    from peftkit.finetune.run_folder import DATA

    file = folder.parent / DATA
    return json.loads(file.read_text(encoding="utf-8"))["labels"] if file.is_file() else None


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
