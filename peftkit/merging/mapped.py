"""Models whose weights stay in their safetensors files, so that a merge holds one layer of them in memory at a time.

The files are mapped: the system reads a page of a file when one of its values is used. ``BaseFiles.release`` drops the pages that were read.
They are read again when they are used again. Weights that are changed in place would lose their changes, so a merge does not change them.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.base.checkpoint import load_checkpoint
from peftkit.base.shards import StoredTensor
from peftkit.errors import ContractError
from peftkit.merging.lazy import LazyTensor

_ATTRIBUTE = "_peftkit_base_files"


class BaseFiles:
    """Where a merge reads the weights of a base model from.

    Attributes:
        note: How they are read, for the certificate.
    """

    def __init__(self, note: str):
        self.note = note
        self._maps: dict[Path, mmap.mmap] = {}

    @property
    def mapped(self) -> bool:
        """Whether weights are read when they are used."""
        return bool(self._maps)

    def __deepcopy__(self, memo: Any) -> BaseFiles:
        return self

    def map(self, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
        """Map the files of these tensors. The result has what transformers' loader needs of each tensor.

        Raises:
            ContractError: The system cannot map a file.
        """
        for file in {tensor.file for tensor in tensors.values()}:
            try:
                with file.open("rb") as stream:
                    # a private copy, because torch has no tensors that cannot be written
                    self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            except OSError as error:
                raise ContractError(f"{file} cannot be mapped into memory: {error}") from error
        return {name: _Mapped(tensor, self._maps[tensor.file]) for name, tensor in tensors.items()}

    def release(self) -> None:
        """Drop the pages that were read, where the system can do this. Otherwise it does so itself when memory is short."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)

    def copied(self, model: nn.Module) -> list[Tensor]:
        """The parameters of a model that are not in the mapped files."""
        places = [
            (torch.frombuffer(mapped, dtype=torch.uint8).data_ptr(), len(mapped))
            for mapped in self._maps.values()
        ]
        return [
            parameter
            for parameter in model.parameters()
            if not isinstance(parameter, LazyTensor)
            and not any(start <= parameter.data_ptr() < start + size for start, size in places)
        ]


class _Mapped:
    """A tensor of a mapped file; ``tensor[...]`` is a lazy view of the file."""

    def __init__(self, stored: StoredTensor, mapped: mmap.mmap):
        self._stored, self._map = stored, mapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stored, name)

    def __getitem__(self, index: Any) -> Tensor:
        stored = self._stored
        if stored.nbytes == 0 or stored.start % stored.dtype.itemsize:
            return stored[index]
        if index is not Ellipsis:
            return self._view()[index]
        return LazyTensor(_View(self._view()), stored.shape, stored.dtype)

    def _view(self) -> Tensor:
        stored = self._stored
        return torch.frombuffer(
            self._map, dtype=stored.dtype, count=math.prod(stored.shape), offset=stored.start
        ).view(stored.shape)


class _View:
    """The values of one tensor of a file."""

    def __init__(self, view: Tensor):
        self.view = view

    def __call__(self) -> Tensor:
        return self.view


def _use_views(model: nn.Module) -> None:
    """Replace lazy tensors by views of the files, except those that are assembled from several tensors."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if not isinstance(tensor, LazyTensor):
                    continue
                if tensors is module._buffers:
                    tensors[name] = tensor.compute()
                elif isinstance(tensor.compute, _View):
                    view = nn.Parameter(tensor.compute(), tensor.requires_grad)
                    tensors[name] = made.setdefault(id(tensor), view)


def load_mapped(path: str, auto_class: Any, *, strict: bool = False, **changes: Any) -> Any:
    """Load a model onto the CPU without reading its weights.

    Stacks of experts whose weights the files have one by one are assembled each time they are used (``LazyTensor``). Weights whose dtype, or
    whose layout in another way, differs between the files and the model are copied into memory.

    Args:
        path: A folder or the id of a model on the Hub, with safetensors files that are not quantised.
        auto_class: The class of the model, or an Auto class.
        strict: As for ``load_base``.
        changes: Values that replace those of the config, or arguments of ``from_pretrained``.

    Returns:
        The model in evaluation mode. ``files_of(model)`` are its files.

    Raises:
        ContractError: The checkpoint cannot be read, or does not fit the class.
    """
    files = BaseFiles(f"the files in {path}, one layer at a time")
    model = load_checkpoint(
        path,
        "auto",
        (),
        auto_class=auto_class,
        dtype=None,
        compute_dtype=None,
        device="cpu",
        strict=strict,
        kwargs=changes,
        as_state_dict=files.map,
    )
    _use_views(model)
    copied = sum(parameter.nbytes for parameter in files.copied(model))
    if copied:
        files.note += (
            f"; {copied / 2**20:.1f} MiB were copied into memory, because their dtype or layout in the files is another than "
            "in the model"
        )
    attach(model, files)
    return model


def attach(model: Any, files: BaseFiles) -> None:
    """Let ``files_of`` find the files of a model."""
    model.__dict__[_ATTRIBUTE] = files


def files_of(model: Any) -> BaseFiles:
    """The files from which a model without adapters reads its weights; without maps if all weights are in memory."""
    return model.__dict__.get(_ATTRIBUTE) or BaseFiles("a model in memory")
