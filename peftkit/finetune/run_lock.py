"""One process trains in a folder at a time."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from peftkit.errors import ContractError
from peftkit.finetune.processes import is_main

if TYPE_CHECKING:
    from peftkit.finetune.run_folder import RunFolder

LOCK = ".lock"
"""In the folder of a run: is locked while a process trains there, and has the number of the last one."""

_held: set[Path] = set()
"""Folders in which this process trains. The system would give it the same lock twice."""


class RunLock:
    """The right to train in a folder. The system releases it when the process ends, however it ends.

    Args:
        folder: The folder, which need not exist yet.
        say: Is told if the file system has no locks.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self.folder, self.say = folder, say
        self._file: int | None = None
        self._taken: Path | None = None

    @property
    def is_taken(self) -> bool:
        """Whether this object has locked the folder."""
        return self._taken is not None

    def take(self) -> None:
        """Lock the folder, which must exist, unless this object has done so.

        Raises:
            ContractError: Another process, or another run of this one, trains there.
        """
        if self._taken is not None:
            return
        folder = self.folder.resolve()
        if folder in _held:
            raise ContractError(_in_use(self.folder, "by another run of this process"))
        # PEP 446: not passed on to programs. Forked workers do not have the lock, either, so they cannot hold it when this process is dead.
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._lock(file)
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except BaseException:
            os.close(file)
            raise
        self._file, self._taken = file, folder
        _held.add(folder)

    def _lock(self, file: int) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            self.say("this system has no file locks; do not start a second run in the folder")
            return
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                owner = os.pread(file, 200, 0).decode(errors="replace").strip()
                raise ContractError(_in_use(self.folder, f"by process {owner}")) from None
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            self.say(
                f"{self.folder} cannot be locked ({error.strerror}); do not start a second run there"
            )

    def close(self) -> None:
        """Give the lock back if it was taken. Its file stays: without it two processes could lock different files of that name."""
        if self._taken is None or self._file is None:
            return
        os.close(self._file)
        _held.discard(self._taken)
        self._file = self._taken = None


@contextmanager
def removed_if_unused(folder: RunFolder, lock: RunLock) -> Iterator[None]:
    """If there is an error before the recipe is written, remove the folders that were made for the run."""
    if not is_main():
        yield
        return
    new = [path for path in (folder.path, *folder.path.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        if lock.is_taken:  # otherwise another process may be about to start there
            folder.remove_if_unused()
        for path in new:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise


def _in_use(folder: Path, whom: str) -> str:
    return (
        f"out={str(folder)!r} is in use {whom}; wait until it ends, end it, or name another folder"
    )
