"""Write a GGUF file under a temporary name, tensor by tensor, and rename it when it is complete."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from peftkit.errors import ContractError
from peftkit.export.tensors import stored_bytes

Entry = tuple[str, tuple[int, ...], Any, Callable[[], np.ndarray]]
"""Name, shape, storage, and a function that computes the stored array."""


@contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """A temporary file next to ``path`` that becomes ``path`` at the end. It is removed if there is an error.

    Raises:
        ContractError: ``path`` is a folder or does not end in ``.gguf``.
    """
    if path.suffix != ".gguf":
        raise ContractError(f"path={str(path)!r}: the name of a GGUF file ends in .gguf")
    if path.is_dir():
        raise ContractError(f"path={str(path)!r} is a folder; pass the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".gguf", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_tensors(writer: Any, entries: Iterable[Entry]) -> int:
    """Write the metadata of a ``gguf.GGUFWriter`` and then one tensor after the other.

    Args:
        writer: Has all metadata.
        entries: The tensors. Only one stored array is in memory at a time.

    Returns:
        The number of tensors.
    """
    entries = list(entries)
    for name, shape, kind, _ in entries:
        held, nbytes = stored_bytes(shape, kind)
        dtype = np.dtype(np.uint8 if held != shape else np.float32)
        writer.add_tensor_info(name, held, dtype, nbytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, _, _, compute in entries:
            writer.write_tensor_data(compute())
    finally:
        writer.close()
    return len(entries)
