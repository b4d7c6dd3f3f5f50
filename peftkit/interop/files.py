"""Read the config and tensors of an adapter folder, saved by PEFT or by AdapterHub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkit import adapter_files

WEIGHT_FILES = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter.safetensors",
    "pytorch_adapter.bin",
)
"""PEFT's two file names, then AdapterHub's two."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of an adapter folder.

    Attributes:
        folder: The folder.
        weights: The file with the tensors.
        config: The content of ``adapter_config.json``.
        tensors: The tensors by their names in the file, on the CPU.
    """

    folder: Path
    weights: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the config and tensors of an adapter saved by PEFT or AdapterHub.

    Args:
        path: The folder.

    Raises:
        ContractError: A file is missing, cannot be read or contains code, or there are no tensors or not all are finite.
    """
    folder = Path(path)
    config = adapter_files.read_config(folder)
    weights = adapter_files.weights_file(folder, WEIGHT_FILES)
    return Checkpoint(
        folder, weights, config, adapter_files.read_tensors(weights, lambda: _load(weights))
    )


def _load(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file, device="cpu")
    return torch.load(file, map_location="cpu", weights_only=True)
