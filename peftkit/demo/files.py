"""Files and folders that are either complete or not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class DemoError(ValueError):
    """The demo cannot go on, for a reason the user can mend."""


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it takes the place of ``folder`` once it is complete.

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
    """Let ``new`` take the place of ``folder``, whose content is deleted last.

    If this is interrupted, ``folder`` holds the old or the new content, or does so after ``recover``.
    """
    recover(folder)
    if folder.exists():
        folder.rename(_old(folder))
    new.rename(folder)
    shutil.rmtree(_old(folder), ignore_errors=True)


def recover(folder: Path) -> None:
    """Finish or undo what an interrupted ``swap_in`` left."""
    old = _old(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def _old(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, then rename; the folder is made if it is missing.

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
    """Turn errors of the file system while ``path`` is written into a ``DemoError`` that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "failed writing" not in str(error):
            raise  # torch.save says so in a RuntimeError
        reason = getattr(error, "strerror", None) or error
        raise DemoError(
            f"{path} cannot be written ({reason}); free space, change the permissions, or name another folder with --out"
        ) from error


def write_json(path: Path, data: Any) -> None:
    """Write as indented JSON, to a temporary name first."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """What ``write_json`` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
