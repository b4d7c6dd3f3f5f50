"""Write a model's folder so that it is either complete or absent, and its tensors one after the other into safetensors shards."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from peftkit.errors import ContractError

INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_MARGIN = 64
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@contextmanager
def new_folder(out_dir: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``out_dir`` that is renamed to ``out_dir`` at the end of the block.

    After an error the temporary folder is deleted. A process that is killed leaves it behind under the name
    ``<out_dir>.partial-<random>``.

    Raises:
        ContractError: ``out_dir`` is a file, or a folder that is not empty.
        OSError: The disk is full, or the folder cannot be written. The message names ``out_dir``.
    """
    require_absent(out_dir)
    with _named_errors(out_dir):
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{out_dir.name}.partial-", dir=out_dir.parent))
        try:
            # mkdtemp makes the folder private; give it the mode of any other new folder
            partial.chmod(0o777 & ~_umask())
            yield partial
            for path in partial.rglob("*"):
                _sync(path)
            _sync(partial)
            partial.rename(out_dir)
            _sync(out_dir.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def require_absent(out_dir: Path) -> None:
    """Raise ``ContractError`` if ``out_dir`` is a file, or a folder that is not empty."""
    if out_dir.is_dir() and not out_dir.is_symlink():
        if any(out_dir.iterdir()):
            raise ContractError(
                f"out_dir={str(out_dir)!r} is not empty; pass a new folder, or delete its content first"
            )
    elif out_dir.exists() or out_dir.is_symlink():
        raise ContractError(
            f"out_dir={str(out_dir)!r} exists and is not a folder; pass the path of a new folder"
        )


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise ``OSError`` if the disk has less free space than the tensors need.

    Args:
        folder: A folder on the disk.
        needed_bytes: The size of all tensors.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"the merged model needs {needed_bytes / 2**30:.2f} GiB and the disk has {free / 2**30:.2f} GiB free",
        )


def parse_size(size: int | str) -> int:
    """Return a size in bytes: ``5000000`` or ``"5GB"``."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"max_shard_size={size!r} is not a size such as '5GB' or 5000000")
    number = int(float(found[1]) * _UNITS[found[2].upper()])
    if number < 1:
        raise ValueError(f"max_shard_size={size!r} must be positive")
    return number


def write_json(path: Path, content: object) -> None:
    """Write a JSON file to a temporary name, then rename it."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        _sync(partial)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


class ShardWriter:
    """Writes tensors into safetensors files, one tensor after the other.

    The header of a safetensors file comes first and lists all tensors of the file. The number of tensors is not known when the first one is
    written, so each file reserves room for its header and fills the rest with spaces, as the format allows.
    """

    def __init__(self, folder: Path, max_shard_size: int, names: int):
        """Create a writer.

        Args:
            folder: An existing folder.
            max_shard_size: Bytes of tensors in one file. A larger tensor has a file of its own.
            names: Expected number of tensors, which determines the room for a header.
        """
        self._folder, self._limit = folder, max_shard_size
        self._room = min(2**20, 4096 + 256 * names)
        self._shards: list[dict[str, dict]] = []
        self._file: BinaryIO | None = None
        self._offset = self._header_size = 0
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.

        Raises:
            ValueError: The name was written before, or safetensors has no such dtype.
        """
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} has the dtype {tensor.dtype}, which cannot be written")
        if any(name in shard for shard in self._shards):
            raise ValueError(f"{name} was written twice")
        size = tensor.numel() * tensor.element_size()
        entry_size = len(json.dumps(name)) + 128 + 24 * tensor.ndim
        full = self._offset + size > self._limit or self._header_size + entry_size > self._room
        if self._file is None or (full and self._shards[-1]):
            self._close()
            self._open(max(self._room, entry_size + _MARGIN))
        assert self._file is not None
        self._file.write(_bytes(tensor))
        self._shards[-1][name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._offset, self._offset + size],
        }
        self._offset += size
        self._header_size += entry_size
        self.total_bytes += size

    def finish(self, parameters: int) -> None:
        """Complete the last file, give all files their final names, and write the index if there are several.

        Args:
            parameters: Number of the model's parameters, for the index.
        """
        self._close()
        count = len(self._shards)
        if count == 1:
            self._path(0).rename(self._folder / "model.safetensors")
            return
        weight_map = {}
        for i, shard in enumerate(self._shards):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            self._path(i).rename(self._folder / file)
            weight_map |= dict.fromkeys(shard, file)
        metadata = {"total_parameters": parameters, "total_size": self.total_bytes}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def abandon(self) -> None:
        """Close the file that is open, without completing it."""
        if self._file is not None:
            self._file, file = None, self._file
            file.close()

    def _path(self, index: int) -> Path:
        return self._folder / f"shard-{index}.incomplete"

    def _open(self, room: int) -> None:
        # the length of the header, 8 bytes, and the header; the tensors start at a multiple of 8
        self._written_room = -(-room // 8) * 8
        self._file = self._path(len(self._shards)).open("wb")
        self._file.write(b" " * (8 + self._written_room))
        self._shards.append({})
        self._offset, self._header_size = 0, _MARGIN

    def _close(self) -> None:
        if self._file is None:
            return
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._shards[-1]}).encode()
        assert len(header) <= self._written_room
        self._file.seek(0)
        self._file.write(self._written_room.to_bytes(8, "little"))
        self._file.write(header.ljust(self._written_room))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.abandon()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _named_errors(out_dir: Path) -> Iterator[None]:
    """Add the folder and the outcome to errors of the file system."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        reason = error.strerror or str(error)
        raise type(error)(
            error.errno,
            f"out_dir={str(out_dir)!r} could not be written ({reason}); nothing was left there",
        ) from error
