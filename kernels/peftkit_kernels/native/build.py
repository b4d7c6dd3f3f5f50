"""Compile the C sources of this folder for this processor, once, into the user's cache.

A library from the cache is loaded only if nobody but this user and root could have changed it, its checksum is that of the
file beside it, and it has every function. Otherwise it is built again. If it cannot be built, the reason is returned, not
raised: torch operations run instead.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from peftkit_kernels.core import cache

_FOLDER = Path(__file__).parent
_FLAGS = (
    "-O3",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
_TIMEOUT_SECONDS = 60
_MAX_BYTES = 2**26
"""Far more than a library has; a larger file is not read."""


class Native(NamedTuple):
    """What ``load`` found.

    Attributes:
        library: The library, or ``None``.
        obstacle: Why there is no library, as a sentence, or ``None``.
        path: Where the library is in the cache.
        note: Why the library was built again although the cache had one, or an empty string.
    """

    library: ctypes.CDLL | None
    obstacle: str | None = None
    path: Path | None = None
    note: str = ""


class _Doubt(Exception):
    """A library must not be used; the message is a sentence."""


@functools.cache
def load(symbols: tuple[str, ...]) -> Native:
    """The library from the cache, or one built now.

    Args:
        symbols: The functions that it must have.
    """
    if os.environ.get("PEFTKIT_NATIVE") == "0":
        return Native(None, "the native passes are switched off (PEFTKIT_NATIVE=0)")
    if platform.system() != "Linux":
        return Native(
            None, f"the native passes are built on Linux only, not on {platform.system()}"
        )
    doubt = ""
    try:
        path = cache.cache_folder() / f"peftkit-cpu-{_fingerprint()}.so"
        try:
            return Native(_load_cached(path, symbols), path=path)
        except FileNotFoundError:
            pass  # this processor and this version have no library yet
        except (_Doubt, cache.Unsafe, OSError) as error:
            doubt = f"the library in the cache is not used: {error}"
        note = doubt and f"built again because {doubt}"
        return Native(_build(path, symbols), path=path, note=note)
    except (_Doubt, cache.Unsafe, OSError) as error:
        return Native(
            None, f"{error}; {doubt}" if doubt and str(error) not in doubt else str(error)
        )


def _flags() -> tuple[str, ...]:
    """The options of the compiler. Code is for this processor, but without AVX-512 if torch is kept from it."""
    limited = torch.backends.cpu.get_cpu_capability() == "AVX2" and torch.cpu._is_avx512_supported()
    return (*_FLAGS, "-march=x86-64-v3" if limited else "-march=native")


def _fingerprint() -> str:
    """What the machine code depends on: the sources, the flags and the instructions of this processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = sorted(
        {line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}
    )
    sources = [path.read_text() for path in sorted(_FOLDER.glob("*.[ch]"))]
    facts = [*sources, *_flags(), platform.machine(), *cpu]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _load_cached(path: Path, symbols: tuple[str, ...]) -> ctypes.CDLL:
    """Raises ``FileNotFoundError`` if there is no library, ``_Doubt``, ``cache.Unsafe`` or ``OSError`` if it is not safe."""
    file = cache.open_file(path, _MAX_BYTES)
    try:
        expected = cache.read_file(_checksum_of(path), 256)
        if expected.strip() != _checksum(file):
            raise _Doubt(f"{path} does not have the checksum in {_checksum_of(path).name}")
    except FileNotFoundError:
        os.close(file)
        raise _Doubt(f"{path} has no checksum beside it") from None
    except BaseException:
        os.close(file)
        raise
    return _open(file, path, symbols)


def _build(path: Path, symbols: tuple[str, ...]) -> ctypes.CDLL:
    """Compile under a temporary name, load the result, then move it to ``path``.

    What was built is never opened again by its name, so two processes that build at the same time do not disturb each other.
    """
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise _Doubt("no C compiler (cc, gcc or clang) is on the PATH")
    try:
        cache.make_folder(path.parent)
        with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as folder:
            built = Path(folder) / path.name
            _compile(compiler, built)
            built.chmod(0o644)
            file = cache.open_file(built, _MAX_BYTES)
            os.fsync(file)  # a full disk may be noticed only now
            library = _open(file, path, symbols)
            cache.write_file(_checksum_of(path), _checksum(file) + b"\n")
            built.replace(path)
    except OSError as error:
        raise _Doubt(
            f"the native passes could not be compiled into {path.parent}: {error}"
        ) from error
    return library


def _compile(compiler: str, built: Path) -> None:
    """Compile into ``built``; raises ``_Doubt``, or ``OSError`` if the compiler cannot be started."""
    sources = map(str, sorted(_FOLDER.glob("*.c")))
    command = [compiler, *_flags(), "-shared", "-fPIC", *sources, "-o", str(built), "-lm"]
    messages = built.with_suffix(".txt")
    # The messages go to a file: a pipe stays open as long as a process that the compiler has started.
    with messages.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
        try:
            code = process.wait(_TIMEOUT_SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # the compiler and what it has started
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise _Doubt(
                    f"the native passes could not be compiled: {compiler} timed out after {_TIMEOUT_SECONDS} seconds"
                ) from None
            raise
    if code != 0:
        lines = messages.read_text(errors="replace").strip().splitlines()
        raise _Doubt(f"{compiler} failed: {lines[-1] if lines else 'no message'}")


def _open(file: int, path: Path, symbols: tuple[str, ...]) -> ctypes.CDLL:
    """Load the library from an open file.

    The file stays open while the process runs: the loader remembers a library by its name, here the number of the
    descriptor, so no other file may get that number.
    """
    try:
        library = ctypes.CDLL(f"/proc/self/fd/{file}")
    except OSError as error:
        os.close(file)
        raise _Doubt(f"{path} cannot be loaded: {error}") from error
    missing = [name for name in symbols if not hasattr(library, name)]
    if missing:
        raise _Doubt(f"{path} has no function {missing[0]}")
    return library


def _checksum(file: int) -> bytes:
    return hashlib.sha256(cache.read_all(file)).hexdigest().encode()


def _checksum_of(path: Path) -> Path:
    """The file that holds the checksum of the library ``path``."""
    return path.with_suffix(".sha256")
