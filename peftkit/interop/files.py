"""A folder with an adapter's config and tensors, whoever wrote it."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkit.errors import ContractError

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter.safetensors",
    "pytorch_adapter.bin",
)
"""PEFT's two and AdapterHub's two."""


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds.

    Attributes:
        folder: Where it was read.
        weights: The file that holds the tensors.
        config: The content of ``adapter_config.json``.
        tensors: By the names they have in the file, on the CPU.
    """

    folder: Path
    weights: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read an adapter's config and tensors, of PEFT or of AdapterHub.

    Raises:
        ContractError: A file is missing, cannot be read, or holds no tensors, or one that is not finite.
    """
    folder = Path(path)
    config = read_config(folder)
    weights = weights_file(folder)
    try:
        if weights.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(weights, device="cpu")
        else:
            tensors = torch.load(weights, map_location="cpu", weights_only=True)
    except _unreadable() as error:
        raise ContractError(
            f"{weights} cannot be read ({error}); it is damaged or incomplete, copy or save it again"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ContractError(f"{weights} holds something else than named tensors; save it again")
    if not tensors:
        raise ContractError(f"{weights} holds no tensors; save the adapter again")
    broken = [key for key, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise ContractError(
            f"{len(broken)} tensors of {weights} hold NaN or infinite values, such as {broken[0]}; load an earlier checkpoint"
        )
    return Checkpoint(folder, weights, config, tensors)


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json``.

    Raises:
        ContractError: The folder or the file is missing, or it is no JSON object.
    """
    if not folder.is_dir():
        raise ContractError(
            f"path={str(folder)!r} is not a folder; download adapters from a hub first "
            "(huggingface_hub.snapshot_download returns the folder)"
        )
    file = folder / CONFIG_FILE
    if not file.is_file():
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise ContractError(
            f"{folder} holds no {CONFIG_FILE}, so it is no adapter; it holds {held}"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ContractError(f"{file} is not JSON ({error}); save the adapter again") from error
    if not isinstance(config, dict):
        raise ContractError(f"{file} is no JSON object; save the adapter again")
    return config


def weights_file(folder: Path) -> Path:
    """The file that holds an adapter's tensors.

    Raises:
        ContractError: There is none.
    """
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise ContractError(
            f"{folder} holds none of {', '.join(WEIGHT_FILES)}; copy the weights next to the config"
        )
    return found


def _unreadable() -> tuple[type[BaseException], ...]:
    from safetensors import SafetensorError

    return SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError
