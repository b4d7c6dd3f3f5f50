"""The folder where peftkit keeps files that it made for this machine, and the check that a file in it is safe to use.

A file from the cache runs as code or changes which code runs. So it is used only if nobody but this user and root could
have written it. The check examines the open file and its open folder, never their names: between the check and the use
someone could give the name to another file.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_HAS_OWNERS = hasattr(os, "geteuid")
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
# without O_NONBLOCK a named pipe would block
_READ = os.O_RDONLY | (
    os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK if _HAS_OWNERS else getattr(os, "O_BINARY", 0)
)


class Unsafe(Exception):
    """A file or folder of the cache must not be used. The message says why, in one sentence."""


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/peftkit`` or ``~/.cache/peftkit``; it may not exist yet.

    A relative ``XDG_CACHE_HOME`` is ignored, as the XDG specification demands.

    Raises:
        Unsafe: ``XDG_CACHE_HOME`` is not an absolute path, and the user has no home folder.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if cache.is_absolute():
        return cache / "peftkit"
    try:
        home = Path.home()
    except RuntimeError:
        home = Path()
    if not home.is_absolute():
        raise Unsafe("the user has no home folder; set XDG_CACHE_HOME to an absolute path")
    return home / ".cache" / "peftkit"


def open_file(path: Path, max_bytes: int) -> int:
    """A descriptor of the file, opened for reading, if only this user and root can change the file.

    Args:
        path: The file. Its folder and the folder above are checked too.
        max_bytes: A larger file is refused.

    Raises:
        FileNotFoundError: There is no such file.
        Unsafe: The file, its folder or the folder above belongs to someone else, or others may write to it; or the file is
            larger than ``max_bytes`` or is not a regular file.
        OSError: The file cannot be opened.
    """
    with _open_folder(path.parent) as folder:
        file = os.open(path if folder is None else path.name, _READ, dir_fd=folder)
    try:
        facts = os.fstat(file)
        if not stat.S_ISREG(facts.st_mode):
            raise Unsafe(f"{path} is not a regular file")
        _check(path, facts)
        if facts.st_size > max_bytes:
            raise Unsafe(f"{path} has {facts.st_size} bytes, more than the limit of {max_bytes}")
    except Unsafe:
        os.close(file)
        raise
    return file


def read_all(file: int) -> bytes:
    """The whole content of an open file, from its start."""
    os.lseek(file, 0, os.SEEK_SET)
    with os.fdopen(os.dup(file), "rb") as stream:
        return stream.read()


def read_file(path: Path, max_bytes: int) -> bytes:
    """The content of a file that only this user and root can change; raises as ``open_file``."""
    file = open_file(path, max_bytes)
    try:
        return read_all(file)
    finally:
        os.close(file)


def write_file(path: Path, content: bytes) -> None:
    """Write a file that others cannot change. Readers see the old content or the new one, never a part.

    Args:
        path: The file; its folder must exist (``make_folder``).
        content: The new content of the file.

    Raises:
        OSError: The file cannot be written.
    """
    file, name = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    try:
        with os.fdopen(file, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def make_folder(path: Path) -> None:
    """Make a folder, if needed, that others cannot write to.

    If the folder exists and belongs to this user, but others can write to it, their permission is removed. Its files are
    deleted first, because others could have written them.

    Raises:
        Unsafe: The folder, or the nearest folder above that exists, belongs to someone else or others can write to it.
        OSError: The folder cannot be made.
    """
    if not path.exists():
        above = path.parent
        while not above.exists():
            above = above.parent
        _check(above, above.stat())
        for folder in (*reversed([p for p in path.parents if p.is_relative_to(above)]), path):
            # the XDG specification asks for mode 700 if a base folder is made
            folder.mkdir(mode=0o755 if folder == path else 0o700, exist_ok=True)
    if _HAS_OWNERS and not path.is_symlink():
        facts = path.stat()
        if facts.st_uid == os.geteuid() and facts.st_mode & _WRITABLE_BY_OTHERS:
            for file in path.iterdir():
                if not file.is_dir() or file.is_symlink():
                    file.unlink()
            path.chmod(stat.S_IMODE(facts.st_mode) & ~_WRITABLE_BY_OTHERS)
    with _open_folder(path):
        pass


@contextlib.contextmanager
def _open_folder(path: Path) -> Iterator[int | None]:
    """A descriptor of the folder, if only this user and root can change it and the folder above it."""
    if not _HAS_OWNERS:
        yield None
        return
    try:
        folder = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW)
    except NotADirectoryError as error:
        kind = "a symbolic link" if path.is_symlink() else "not a folder"
        raise Unsafe(f"{path} is {kind}") from error
    try:
        _check(path, os.fstat(folder), may_be_sticky=False)
        _check(path.parent, os.stat("..", dir_fd=folder))
        yield folder
    finally:
        os.close(folder)


def _check(path: Path, facts: os.stat_result, may_be_sticky: bool = True) -> None:
    """Raise ``Unsafe`` if someone other than this user and root can change the file or folder.

    In a folder with the sticky bit, such as ``/tmp``, others can make entries of their own but cannot replace those of this
    user. Each entry that is used is checked too.
    """
    if not _HAS_OWNERS:
        return
    if facts.st_uid not in (0, os.geteuid()):
        raise Unsafe(
            f"{path} belongs to user {facts.st_uid}, who could change it; this process runs as user {os.geteuid()}. Set "
            "XDG_CACHE_HOME to a folder of your own"
        )
    is_sticky = stat.S_ISDIR(facts.st_mode) and bool(facts.st_mode & stat.S_ISVTX)
    if facts.st_mode & _WRITABLE_BY_OTHERS and not (is_sticky and may_be_sticky):
        raise Unsafe(
            f"other users may write to {path} (mode {stat.S_IMODE(facts.st_mode):o}); run: chmod go-w '{path}'"
        )
