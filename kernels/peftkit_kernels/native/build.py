"""Compile the C sources of this folder for the processor at hand, once, into the user's cache; no compiler is a reason, not an error."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from peftkit_kernels.cache import cache_folder

_FOLDER = Path(__file__).parent
_FLAGS = (
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
_TIMEOUT_SECONDS = 60


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The compiled library and the path it lies at, or ``None`` and the sentence saying why there is none."""
    if os.environ.get("PEFTKIT_NATIVE") == "0":
        return None, "the native passes are switched off (PEFTKIT_NATIVE=0)"
    if platform.system() != "Linux":
        return None, f"the native passes are built on Linux only, not on {platform.system()}"
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    library = cache_folder() / f"peftkit-cpu-{_fingerprint(compiler)}.so"
    if not library.exists():
        if compiler is None:
            return None, "no C compiler (cc, gcc or clang) is on the PATH"
        problem = _compile(compiler, library)
        if problem:
            return None, problem
    try:
        return ctypes.CDLL(str(library)), str(library)
    except OSError as error:
        return None, f"{library} cannot be loaded: {error}"


def _fingerprint(compiler: str | None) -> str:
    """What the machine code depends on: the source, the flags and the instructions of this processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = sorted(
        {line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}
    )
    sources = [path.read_text() for path in sorted(_FOLDER.glob("*.[ch]"))]
    facts = [*sources, *_FLAGS, platform.machine(), *cpu]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _compile(compiler: str, library: Path) -> str | None:
    """Build under a temporary name, then rename; returns what went wrong."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            sources = map(str, sorted(_FOLDER.glob("*.c")))
            command = [compiler, *_FLAGS, "-shared", "-fPIC", *sources, "-o", str(built), "-lm"]
            result = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS
            )
            if result.returncode != 0:
                return (
                    f"{compiler} failed: {result.stderr.strip().splitlines()[-1:] or 'no message'}"
                )
            built.replace(library)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the native passes could not be compiled into {library.parent}: {error}"
    return None
