"""Write files and folders so that each is either complete or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class DemoError(ValueError):
    """The demo cannot continue, for a reason that the user can correct."""


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill. At the end of the block it replaces ``folder``.

    Raises:
        DemoError: The disk is full, or the folder cannot be written.
    """
    partial = _partial(folder)
    with writing(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        swap_in(partial, folder)


def swap_in(new: Path, folder: Path) -> None:
    """Replace ``folder`` by ``new``, and delete the old content at the end.

    If this is interrupted, ``folder`` has either the old or the new content, at the latest after ``recover``.
    """
    recover(folder)
    if folder.exists():
        folder.rename(_old(folder))
    new.rename(folder)
    shutil.rmtree(_old(folder), ignore_errors=True)


def recover(folder: Path) -> None:
    """Complete or undo an interrupted ``swap_in``."""
    old = _old(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def _old(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def write_text(path: Path, text: str) -> None:
    """Write a text to a temporary file, then rename it. A missing folder is created.

    Raises:
        DemoError: The disk is full, or the folder cannot be written.
    """
    partial = _partial(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert errors of the file system to a ``DemoError`` that names ``path``, which the block writes."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "failed writing" not in str(error):
            raise  # torch.save raises a RuntimeError with "failed writing" if the disk is full
        reason = getattr(error, "strerror", None) or error
        raise DemoError(
            f"{path} cannot be written ({reason}); free some space, change the permissions, or use another folder with --out"
        ) from error


def write_json(path: Path, data: Any) -> None:
    """Write data as indented JSON, in the same way as ``write_text``."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a file written by ``write_json``."""
    return json.loads(path.read_text(encoding="utf-8"))
