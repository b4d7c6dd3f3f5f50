"""Cached libraries that must not be loaded.

``python tests/native_cache.py FOLDER`` loads each case of ``CASES`` and prints the messages of ``build.load`` as JSON.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

USE = """
import torch
from peftkit_kernels import native

print(native.description())
x, weight = torch.linspace(-3, 3, 64).view(4, 16), torch.ones(16)
assert native.supports(x, weight)
expected = torch.nn.functional.rms_norm(x, (16,), weight, 1e-5)
torch.testing.assert_close(native.rms_norm(x, weight, 1e-5, 0.0)[0], expected)
"""
"""A program that finds the library and runs one of its functions."""


class Cached:
    """A library in a separate cache folder."""

    def __init__(self, root: Path, library: Path):
        self.root, self.library = root, library
        self.folder, self.checksum = library.parent, library.with_suffix(".sha256")

    def replace(self, content: bytes, with_checksum: bool = False) -> None:
        """Replace the content of the library; ``with_checksum`` also updates the checksum file.

        This writes a new file, because a loaded library must not change.
        """
        self.library.unlink()
        self.library.write_bytes(content)
        if with_checksum:
            self.checksum.write_text(hashlib.sha256(content).hexdigest())


def _truncated(cached: Cached) -> None:
    cached.replace(cached.library.read_bytes()[:20000])


def _changed(cached: Cached) -> None:
    content = bytearray(cached.library.read_bytes())
    content[len(content) // 2] ^= 1
    cached.replace(bytes(content))


def _garbage(cached: Cached) -> None:
    cached.replace(bytes(range(256)) * 400)


def _garbage_with_checksum(cached: Cached) -> None:
    cached.replace(bytes(range(256)) * 400, with_checksum=True)


def _no_checksum(cached: Cached) -> None:
    cached.checksum.unlink()


def _pipe_as_checksum(cached: Cached) -> None:
    cached.checksum.unlink()
    os.mkfifo(cached.checksum)


def _other_functions(cached: Cached) -> None:
    source = cached.root / "other.c"
    source.write_text("int other;")
    other = source.with_suffix(".so")
    subprocess.run([shutil.which("cc"), "-shared", source, "-o", other], check=True)
    cached.replace(other.read_bytes(), with_checksum=True)


def _link(cached: Cached) -> None:
    elsewhere = cached.root / "elsewhere.so"
    cached.library.replace(elsewhere)
    cached.library.symlink_to(elsewhere)


CASES = {
    "truncated": _truncated,
    "empty": lambda cached: cached.replace(b""),
    "empty with its checksum": lambda cached: cached.replace(b"", with_checksum=True),
    "garbage": _garbage,
    "garbage with its checksum": _garbage_with_checksum,
    "one bit changed": _changed,
    "larger than any library": lambda cached: cached.replace(bytes(2**26 + 1), with_checksum=True),
    "without a checksum": _no_checksum,
    "a named pipe for a checksum": _pipe_as_checksum,
    "other functions": _other_functions,
    "a file that others may write": lambda cached: cached.library.chmod(0o666),
    "a checksum that others may write": lambda cached: cached.checksum.chmod(0o666),
    "a folder that others may write": lambda cached: cached.folder.chmod(0o777),
    "a folder that a group may write": lambda cached: cached.folder.chmod(0o775),
    "a symbolic link": _link,
}
if os.geteuid() == 0:
    CASES["someone else's file"] = lambda cached: os.chown(cached.library, 12345, 12345)


def load_doubtful(folder: Path) -> dict[str, dict[str, str]]:
    """By case, the messages with a compiler, in the next process, and without a compiler."""
    from peftkit_kernels import native
    from peftkit_kernels.native import build

    def load(note: bool) -> str:
        found = build.load.__wrapped__(native.SYMBOLS)
        return found.note if note else str(found.obstacle)

    os.environ.pop("PEFTKIT_NATIVE", None)
    os.environ["XDG_CACHE_HOME"] = str(folder / "first")
    built = build.load(native.SYMBOLS).path
    assert built is not None, native.obstacle()
    # a fast stand-in for the compiler, which copies the library that was built before
    copy = folder / "cc"
    copy.write_text(
        f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nexec {shutil.which("cp")} {built} "$2"\n'
    )
    copy.chmod(0o700)
    path, said = os.environ["PATH"], {}
    for number, (name, spoil) in enumerate(CASES.items()):
        root = folder / f"{number}"
        os.environ["XDG_CACHE_HOME"], os.environ["PATH"] = str(root), str(folder)
        assert load(note=True) == ""
        cached = Cached(root, root / "peftkit" / built.name)
        os.environ["PATH"] = path
        spoil(cached)
        os.environ["PATH"] = str(folder)
        said[name] = {"with a compiler": load(note=True), "afterwards": load(note=True)}
        os.environ["PATH"] = path
        spoil(cached)
        os.environ["PATH"] = ""
        said[name]["without a compiler"] = load(note=False)
    return said


if __name__ == "__main__":
    print(json.dumps(load_doubtful(Path(sys.argv[1]))))
