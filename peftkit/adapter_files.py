"""Read the config and the tensors of an adapter's folder. Errors name the file and say what to do."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from peftkit.errors import ContractError, count, listing, short

CONFIG_FILE = "adapter_config.json"
_MAX_CONFIG_BYTES = 2**24
_LFS_POINTER = b"version https://git-lfs"
# torch.load reads these with weights_only=True: they rebuild tensors.
_DATA = (
    "collections.OrderedDict",
    "torch._utils._rebuild_",
    "torch.storage.",
    "torch.Size",
    "torch.Tensor",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
    "__builtin__.set",
    "builtins.set",
    "_codecs.encode",
)


def require_model(model: Any, path: Any, call: str) -> None:
    """Raise unless ``model`` is a module and ``path`` can name a folder.

    Args:
        model: What the user passed as the model.
        path: What the user passed as the folder.
        call: How the call should look, for the message: ``"load_adapter(model, path)"``.

    Raises:
        ContractError: One of them has another type, or the two arguments are swapped.
    """
    if isinstance(model, (str, os.PathLike)) and isinstance(path, nn.Module):
        raise ContractError(
            f"the arguments are swapped: model is {str(model)!r} and path is a {type(path).__name__}; call {call}"
        )
    if not isinstance(model, nn.Module):
        raise ContractError(
            f"model={short(model)} is of type {type(model).__name__}, not a model; load one first, for example with "
            "transformers.AutoModelForCausalLM.from_pretrained"
        )
    if not isinstance(path, (str, os.PathLike)):
        raise ContractError(
            f"path={short(path)} is of type {type(path).__name__}, not a path; pass the folder that holds {CONFIG_FILE}"
        )


def require_adapter_name(adapter_name: Any) -> None:
    """Raise unless torch's module containers accept this name.

    Raises:
        ContractError: It is not a string, empty, has dots, or is the name of a method of those containers.
    """
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ContractError(f"adapter_name={adapter_name!r}: use a non-empty name without dots")
    if hasattr(nn.ModuleDict, adapter_name) or hasattr(nn.ParameterDict, adapter_name):
        raise ContractError(
            f"adapter_name={adapter_name!r} is the name of a method of torch's modules; use another name"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json``.

    Raises:
        ContractError: The folder or the file is missing or cannot be read, or the file is not a JSON object with unique fields
            and finite numbers.
    """
    if not _is("dir", folder):
        if folder.is_symlink():
            raise ContractError(
                f"path={str(folder)!r} is a symbolic link that does not lead to a folder; correct the link or the path"
            )
        raise ContractError(
            f"path={str(folder)!r} is not a folder; download adapters from a hub first "
            "(huggingface_hub.snapshot_download returns the folder)"
        )
    file = folder / CONFIG_FILE
    if _is("dir", file):
        raise ContractError(f"{file} is a folder, not a file; save the adapter again")
    if not _is("file", file):
        with reading(file):
            content = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise ContractError(
            f"{file} does not exist; path must be a folder written by save_pretrained of a PeftModel (it holds {content})"
        )
    with reading(file):
        size = file.stat().st_size
        if size > _MAX_CONFIG_BYTES:
            raise ContractError(
                f"{file} has {size / 2**20:.0f} MiB, but a config has a few KiB; it is another file, save the adapter again"
            )
        content = file.read_bytes()
    return _parse(file, content)


def _parse(file: Path, content: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ContractError(
                f"{file} sets {twice!r} {names.count(twice)} times; keep one of them"
            )
        return dict(pairs)

    try:
        config = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except ContractError:
        raise
    except RecursionError as error:
        raise ContractError(
            f"{file} nests its values too deeply for a config; save the adapter again"
        ) from error
    except ValueError as error:
        raise ContractError(
            f"{file} is not a PEFT config: it is not JSON in UTF-8 ({error}); save the adapter again"
        ) from error
    if not isinstance(config, dict):
        raise ContractError(
            f"{file} is not a PEFT config: it holds {short(config)}, not an object with fields; save the adapter again"
        )
    _require_finite(file, config)
    return config


def _require_finite(file: Path, config: dict[str, Any]) -> None:
    waiting: list[tuple[str, Any]] = list(config.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, float) and not abs(value) < float("inf"):
            raise ContractError(f"{file}: {name}={value} is not a finite number; correct it")
        if isinstance(value, dict):
            waiting.extend((f"{name}.{key}", item) for key, item in value.items())
        elif isinstance(value, list):
            waiting.extend((f"{name}[{index}]", item) for index, item in enumerate(value))


def weights_file(folder: Path, names: Collection[str]) -> Path:
    """Return the first of these files that exists in a folder.

    Raises:
        ContractError: None of them exists, or the first one is a folder.
    """
    file = next((folder / name for name in names if _exists(folder / name)), None)
    if file is None:
        raise ContractError(
            f"{folder} holds none of {', '.join(names)}; copy the weights next to the config"
        )
    if not _is("file", file):
        raise ContractError(f"{file} is not a file; copy the weights next to the config")
    return file


def read_tensors(file: Path, load: Callable[[], Any]) -> dict[str, Tensor]:
    """Load tensors, and check that all values are finite.

    Args:
        file: The file that ``load`` reads.
        load: Returns the tensors by name, on the CPU.

    Raises:
        ContractError: The file contains code, cannot be read, has no tensors or other objects than tensors, or has NaN or
            infinite values.
    """
    with reading(file):
        with file.open("rb") as stream:
            start = stream.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise ContractError(
                f"{file} is a Git LFS pointer, not the weights; run `git lfs pull`, or download the file itself"
            )
        try:
            tensors = load()
        except Exception as error:
            code = [] if file.suffix == ".safetensors" else _code(file)
            if code:
                raise ContractError(
                    f"{file} contains code ({', '.join(code[:3])}), which would run when the file is loaded; it was not "
                    "loaded. Ask its author for a .safetensors file, which can only hold tensors."
                ) from error
            raise
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ContractError(
            f"{file} holds other objects than named tensors; save the adapter again"
        )
    if not tensors:
        raise ContractError(f"{file} holds no tensors; save the adapter again")
    broken = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if broken:
        raise ContractError(
            f"{count(len(broken), 'tensor')} of {file} {'holds' if len(broken) == 1 else 'hold'} NaN or infinite values, so "
            f"training had already diverged:\n{listing(broken)}\nLoad an earlier checkpoint."
        )
    return tensors


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Convert every error of a reader to a ``ContractError`` that names the file."""
    try:
        yield
    except ContractError:
        raise
    except PermissionError as error:
        raise ContractError(
            f"{file} may not be read by this user ({error.strerror}); change its permissions"
        ) from error
    except OSError as error:
        raise ContractError(f"{file} cannot be read ({error}); check the path and the disk") from error  # fmt: skip
    except Exception as error:
        # A parser of a damaged file fails in many ways: KeyError, EOFError, RuntimeError, UnpicklingError, SafetensorError ...
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if isinstance(error, pickle.UnpicklingError):
            what = "torch.save did not write it"  # torch's own text advises to load it with weights_only=False
        raise ContractError(
            f"{file} cannot be read ({what}); it is damaged or incomplete, copy or save it again"
        ) from error


def _code(file: Path) -> list[str]:
    """Return the functions and classes that unpickling this file would import, except those that rebuild tensors."""
    names: list[str] = []
    with file.open("rb") as stream:
        if zipfile.is_zipfile(stream):
            with zipfile.ZipFile(stream) as archive:
                for member in archive.namelist():
                    if member.endswith(".pkl"):
                        with archive.open(member) as pickled:
                            names += _imports(pickled)
        else:
            stream.seek(0)
            names += _imports(stream)
    return sorted({name for name in names if not name.startswith(_DATA) and not _is_storage(name)})


def _imports(stream: IO[bytes]) -> list[str]:
    """Return the names that a stream of pickles imports, up to the first byte that is not part of a pickle."""
    names: list[str] = []
    strings: list[str] = []
    with suppress(ValueError, KeyError, IndexError, UnicodeDecodeError):
        # genops raises ValueError at the end of the stream and at bytes that are no pickle
        while True:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    names.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    return names


def _is_storage(name: str) -> bool:
    module, _, kind = name.rpartition(".")
    return module == "torch" and (
        kind.endswith("Storage") or isinstance(getattr(torch, kind, None), torch.dtype)
    )


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # torch has no isfinite for float8
    return bool(tensor.isfinite().all())


def _is(kind: str, path: Path) -> bool:
    with reading(path):
        return path.is_dir() if kind == "dir" else path.is_file()


def _exists(path: Path) -> bool:
    with reading(path):
        return path.exists()
