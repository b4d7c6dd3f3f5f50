"""Read the tensors of a checkpoint one at a time, without mapping its files into memory.

A mapped file counts as memory of the process as far as it has been read, and a tensor that is a view of it keeps it mapped: 6 GB for a
3B model whose weights are quantised to 2 GB. Here each tensor is read into memory of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkit.errors import ContractError, count

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Torch's dtypes by their names in safetensors files."""

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_LFS_POINTER = b"version https://git-lfs"
_AGAIN = "download or copy the file again"


class Stop(BaseException):
    """Carries a ``ContractError`` through transformers' loader, which collects every ``Exception`` and would go on reading."""

    def __init__(self, error: ContractError):
        super().__init__(str(error))
        self.error = error


class StoredTensor:
    """One tensor of a safetensors file. ``tensor[...]`` reads it, which is all that transformers' loader asks for.

    Attributes:
        name: Its name in the file.
        file: The file.
        shape: Its shape.
        dtype: Its dtype.
        start: Where its values start in the file, in bytes.
        require_finite: Whether reading a tensor with NaN or infinite values is an error.
    """

    require_finite = True

    def __init__(self, name: str, file: Path, start: int, entry: Mapping[str, Any]):
        self.name = name
        self.file = file
        self.shape = tuple(entry["shape"])
        self.dtype = DTYPES[entry["dtype"]]
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        self._kind: str = entry["dtype"]
        self.start = start + entry["data_offsets"][0]

    def get_dtype(self) -> str:
        """The dtype's name in safetensors files."""
        return self._kind

    def get_shape(self) -> list[int]:
        """The shape."""
        return list(self.shape)

    def is_floating_point(self) -> bool:
        """Whether its values are floating-point numbers."""
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> Tensor:
        """Read the tensor, or a part of it if ``index`` is not ``...``.

        Raises:
            Stop: The file cannot be read, or has become shorter, or the tensor has values that are not finite.
        """
        try:
            whole = self.read()
        except ContractError as error:
            raise Stop(error) from error
        return whole if index is Ellipsis else whole[index]

    def read(self) -> Tensor:
        """Read the tensor into new memory.

        Raises:
            ContractError: As for ``[...]``.
        """
        out = torch.empty(self.nbytes, dtype=torch.uint8)
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.start)
                view = memoryview(out.numpy())
                done = 0
                while done < self.nbytes and (got := file.readinto(view[done:])):
                    done += got
        except OSError as error:
            raise ContractError(
                f"{self.file}: cannot read tensor {self.name!r}: {error}"
            ) from error
        if done < self.nbytes:
            raise ContractError(
                f"{self.file} ends inside tensor {self.name!r}: it became shorter while it was read; {_AGAIN}"
            )
        whole = out.view(self.dtype).view(self.shape)
        if self.require_finite:
            self._check_finite(whole)
        return whole

    def _check_finite(self, whole: Tensor) -> None:
        if self.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            return
        bad = count_not_finite(whole)
        if bad:
            raise ContractError(
                f"{self.file}: tensor {self.name!r} of shape {self.shape} has {count(bad, 'value')} that "
                f"{'is' if bad == 1 else 'are'} NaN or infinite, so that the model's outputs would be too; repair the checkpoint, "
                "or pass strict=False if it is meant"
            )


def count_not_finite(values: Tensor, chunk: int = 2**17) -> int:
    """Return how many values are NaN or infinite. At most ``chunk`` values are looked at together, to save memory."""
    flat = values.reshape(-1)
    return sum(
        part.numel() - int(part.isfinite().sum())
        for part in (flat[start : start + chunk] for start in range(0, flat.numel(), chunk))
    )


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Read the headers of safetensors files and check them against the sizes of the files.

    Returns:
        All tensors by name.

    Raises:
        ContractError: A file is missing, truncated, or no safetensors file; or two files have a tensor of one name.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _tensors_of(file):
            other = tensors.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise ContractError(
                    f"tensor {tensor.name!r} is in {other.file} and in {file}; remove the file that is not part of the checkpoint"
                )
    return tensors


def _tensors_of(file: Path) -> Iterator[StoredTensor]:
    start, header, size = _header_of(file)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            tensor = StoredTensor(name, file, start, entry)
            begin, end = entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            known = entry.get("dtype") in DTYPES if isinstance(entry, dict) else False
            reason = f"{error}" if known else "its dtype is not known"
            raise ContractError(
                f"{file}: the entry {entry!r} of tensor {name!r} cannot be read: {reason}"
            ) from error
        if begin < 0 or end - begin != tensor.nbytes:
            raise ContractError(
                f"{file}: tensor {name!r} has {end - begin:,} bytes, but its shape {tensor.shape} and {entry['dtype']} need "
                f"{tensor.nbytes:,}; {_AGAIN}"
            )
        if start + end > size:
            raise ContractError(
                f"{file} is truncated: tensor {name!r} ends at byte {start + end:,}, the file at byte {size:,}; {_AGAIN}"
            )
        yield tensor


def _header_of(file: Path) -> tuple[int, dict[str, Any], int]:
    """Return where the tensors start, the header, and the size of the file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(_LENGTH_BYTES)
            length = int.from_bytes(head, "little")
            if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
                raise ContractError(
                    _not_safetensors(file, head + stream.read(len(_LFS_POINTER)), size)
                )
            text = stream.read(length)
    except OSError as error:
        raise ContractError(f"{file} cannot be read: {error}") from error
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ContractError(
            f"{file} is not a safetensors file: its header is no JSON ({error}); {_AGAIN}"
        ) from error
    if not isinstance(header, dict):
        raise ContractError(
            f"{file} is not a safetensors file: its header is no JSON object; {_AGAIN}"
        )
    return _LENGTH_BYTES + length, header, size


def _not_safetensors(file: Path, head: bytes, size: int) -> str:
    if head.startswith(_LFS_POINTER):
        return f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
    return f"{file} is truncated or not a safetensors file: it has {size:,} bytes, which end within its header; {_AGAIN}"
