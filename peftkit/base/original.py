"""Read single weights of the checkpoint from which a base model was quantised."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from peftkit.base.files import open_checkpoint
from peftkit.errors import ContractError, short


class OriginalWeights:
    """The weights in the safetensors files of a checkpoint, read one at a time.

    Attributes:
        path: The folder or the id on the Hub.
    """

    def __init__(
        self,
        path: str | Path,
        argument: str,
        prefix: str = "",
        transposed: frozenset[str] = frozenset(),
    ):
        """Find the files and read their headers.

        Args:
            path: A folder, or the id of a repository on the Hub.
            argument: The name of the argument that has the path, for messages.
            prefix: ``base_model_prefix`` of the model. Checkpoints of models without their head have names without it, and the reverse.
            transposed: Names of weights that the checkpoint has as ``[K, N]`` and the model as ``[N, K]``.

        Raises:
            ContractError: There are no safetensors files, or they cannot be read.
        """
        self.path = os.fspath(path)
        self._argument, self._prefix = argument, f"{prefix}." if prefix else ""
        self._transposed = transposed
        try:
            self._tensors = open_checkpoint(self.path, {})
        except ContractError as error:
            raise ContractError(
                f"{argument}={short(self.path)} is not the checkpoint of the original model: {error}"
            ) from error

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read a weight.

        Raises:
            ContractError: There is no such weight, its shape differs, or it is quantised, not finite or unreadable.
        """
        self.require(name, shape)
        weight = self._find(name).read()
        return weight.T if name in self._transposed else weight

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise unless there is a weight of this name and shape, without reading it.

        Raises:
            ContractError: As for ``__call__``.
        """
        found = self._find(name)
        shape = tuple(shape)[::-1] if name in self._transposed else tuple(shape)
        if found is None:
            raise ContractError(
                f"{self._argument}={self.path!r} has no tensor {name}; pass the original of the base model"
            )
        if found.shape != shape or not found.is_floating_point() or found.dtype.itemsize < 2:
            raise ContractError(
                f"{self._argument}={self.path!r}: {name} is {found.dtype} of shape {list(found.shape)}, but the model's is "
                f"{list(shape)}; pass the original of the base model, not a quantised one"
            )

    def _find(self, name: str) -> Any:
        for known in (name, self._prefix + name, name.removeprefix(self._prefix)):
            if known in self._tensors:
                return self._tensors[known]
        return None
