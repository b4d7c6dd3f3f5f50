"""Read single weights of a model's folder, to merge into them instead of the quantised weights that were loaded."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from peftkit.errors import ContractError, short
from peftkit.merging.files import INDEX_FILE


class OriginalWeights:
    """The weights in the safetensors files of a folder, read one at a time.

    Attributes:
        folder: The folder.
    """

    def __init__(self, folder: str | Path):
        """Find the files.

        Raises:
            ContractError: The folder has no safetensors files.
        """
        self.folder = Path(folder)
        index, single = self.folder / INDEX_FILE, self.folder / "model.safetensors"
        if index.is_file():
            self._files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif single.is_file():
            from safetensors import safe_open

            with safe_open(single, framework="pt") as file:
                self._files = dict.fromkeys(file.keys(), single.name)
        else:
            raise ContractError(
                f"base_weights={short(str(folder))} is not a folder with model.safetensors or {INDEX_FILE}; pass the local folder "
                "of the original model"
            )

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read a weight.

        Raises:
            ContractError: There is no such weight, or its shape differs.
        """
        from safetensors import safe_open

        if name not in self._files:
            raise ContractError(
                f"base_weights={str(self.folder)!r} has no tensor {name}; pass the original of the base model"
            )
        with safe_open(self.folder / self._files[name], framework="pt") as file:
            weight = file.get_tensor(name)
        if tuple(weight.shape) != tuple(shape) or not weight.is_floating_point():
            raise ContractError(
                f"base_weights={str(self.folder)!r}: {name} is {weight.dtype} of shape {list(weight.shape)}, but the model's is "
                f"{list(shape)}; pass the original of the base model, not a quantised one"
            )
        return weight
