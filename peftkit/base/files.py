"""Find the weight files of a checkpoint: a local folder or a repository on the Hub, one file or several."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftkit.base.shards import StoredTensor, read_headers
from peftkit.errors import ContractError, listing

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
"""Arguments of ``from_pretrained`` that say where the files are."""


def open_checkpoint(
    path: str, hub: Mapping[str, Any], variant: str | None = None, file_name: str | None = None
) -> dict[str, StoredTensor]:
    """Find the weight files and read their headers.

    Args:
        path: A folder or the id of a repository on the Hub.
        hub: Values for some of ``HUB_ARGUMENTS``.
        variant: ``"fp16"`` for ``model.fp16.safetensors`` and so on.
        file_name: The name of the file or index, if it is not one of transformers' names.

    Returns:
        All tensors by their names in the checkpoint.

    Raises:
        ContractError: There are no such files, or one is missing, or cannot be read.
    """
    for name in [file_name] if file_name else [_with(SINGLE, variant), _with(INDEX, variant)]:
        found = _find(path, name, hub)
        if found is not None:
            break
    else:
        raise ContractError(_nothing_found(path, hub, variant))
    if found.name.endswith(".safetensors"):
        return read_headers([found])
    places = _weight_map(found)
    tensors = read_headers(_shards(path, found, sorted(set(places.values())), hub))
    lost = [f"{name} ({file})" for name, file in places.items() if name not in tensors]
    if lost:
        raise ContractError(
            f"{found} lists tensors that its files do not have:\n{listing(lost)}\n"
            "The index belongs to another checkpoint, or a file was replaced; download or copy the folder again."
        )
    return tensors


def _with(name: str, variant: str | None) -> str:
    """Insert a variant as transformers does: ``model.fp16.safetensors``, ``model.safetensors.index.fp16.json``."""
    before, _, end = name.rpartition(".")
    return name if variant is None else f"{before}.{variant}.{end}"


def _find(path: str, name: str, hub: Mapping[str, Any]) -> Path | None:
    """Return where a file is on this machine, downloaded if needed, or ``None`` if the checkpoint does not have it."""
    from transformers.utils.hub import cached_file

    found = cached_file(
        path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
    return None if found is None else Path(found)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        places = json.loads(index.read_text())["weight_map"]
        if not places or not all(isinstance(file, str) for file in places.values()):
            raise TypeError("weight_map is empty or does not map names to files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ContractError(
            f"{index} is no index of a checkpoint ({type(error).__name__}: {error}); download or copy it again"
        ) from error
    strange = [file for file in places.values() if Path(file).name != file]
    if strange:
        raise ContractError(f"{index} names {strange[0]!r}, which is not in its own folder")
    return places


def _shards(path: str, index: Path, names: list[str], hub: Mapping[str, Any]) -> list[Path]:
    found = {name: _find(path, name, hub) for name in names}
    missing = [name for name, file in found.items() if file is None]
    if missing:
        raise ContractError(
            f"{index} names {len(names)} files, of which {len(missing)} are missing in {path}:\n{listing(missing)}\n"
            "Download or copy them again."
        )
    return [file for file in found.values() if file is not None]


def _nothing_found(path: str, hub: Mapping[str, Any], variant: str | None) -> str:
    """Say why there is no checkpoint to read, and what to do."""
    names = f"neither {_with(SINGLE, variant)} nor {_with(INDEX, variant)}"
    if not Path(path).is_dir():
        return (
            f"{path} has {names} on the Hub, or they cannot be downloaded now and are not in the local cache; check the id, "
            "revision and token, or pass a folder"
        )
    folder = Path(path, hub.get("subfolder") or "")
    files = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    shards = [name for name in files if name.endswith(".safetensors")]
    if shards:
        return (
            f"{folder} has {names}, but {len(shards)} other safetensors files ({shards[0]}, ...); copy the index too, "
            f"or pass variant= if the names have one"
        )
    if any(name.endswith((".bin", ".pt", ".pth")) for name in files):
        return (
            f"{folder} has {names}; its weights are pickle files, which must be read as a whole. Convert them once: "
            f"transformers.AutoModel.from_pretrained({path!r}).save_pretrained(NEW_FOLDER), with the Auto class of your task"
        )
    return f"{folder} has {names}; it has {', '.join(files[:5]) or 'no files'}"
