"""The vector instructions of a measurement: limits for child processes, and what torch, oneDNN, MKL and native code really run."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Callable
from typing import Any

ISA = {
    "native": {},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
"""Environment variables that keep torch, oneDNN and MKL from newer instructions. torch.compile and peftkit's native code follow torch."""

_TOO_NEW = {"avx2": re.compile(r"avx.?512|amx", re.IGNORECASE)}
"""What a library that keeps to the limit does not name."""

_REGISTERS = {64: "AVX-512", 32: "AVX2", 0: "none"}


def variables(isa: str) -> dict[str, str]:
    """The environment variables of a measured process.

    Compiled code has one folder for each limit: the caches of torch.compile do not know the limit, so under ``avx2`` they would hand out
    code that was made for AVX-512, which fails or computes wrong values. torch.compile compiles in the process itself: workers of its
    own would go on next to the timed steps, and their time would count as that of other programs.
    """
    from peftkit_kernels.core.cache import cache_folder

    folder = cache_folder() / "benchmarks" / isa
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    return ISA[isa] | caches


def in_use(native: bool = False, compiled: bool = False) -> dict[str, str]:
    """What each library of this process runs, in its own words.

    Args:
        native: Whether peftkit's native code is loaded.
        compiled: Whether torch.compile was used.
    """
    import torch

    square = torch.ones(64, 64)
    found = {"torch": torch.backends.cpu.get_cpu_capability()}
    if torch.backends.mkldnn.is_available():
        product: Any = torch.ops.mkldnn._linear_pointwise
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            said = _printed_by(lambda: product(square, square, None, "none", [], ""))
        found["oneDNN"] = _first(r"cpu,isa:(.*)", said)
    if torch.backends.mkl.is_available():
        with torch.backends.mkl.verbose(torch.backends.mkl.VERBOSE_ON):
            said = _printed_by(lambda: torch.mm(square, square))
        found["MKL"] = _first(r"64 architecture (.*?) ?(?:enabled )?processors", said)
    if native:
        from peftkit_kernels.native import register_bytes

        found["peftkit"] = _REGISTERS[register_bytes()]
    if compiled:
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        found["torch.compile"] = str(pick_vec_isa())
    return found


def too_new(found: dict[str, str], isa: str) -> str | None:
    """The first library that exceeds the limit ``isa``, as a sentence, or ``None``."""
    pattern = _TOO_NEW.get(isa)
    for library, text in found.items():
        if pattern is not None and pattern.search(text):
            return f"{library} runs {text} in spite of --isa {isa}"
    return None


def _printed_by(call: Callable[[], object]) -> str:
    """What C code prints to standard output during a call."""
    sys.stdout.flush()
    libc = ctypes.CDLL(None)
    with tempfile.TemporaryFile() as file:
        saved = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            call()
            libc.fflush(None)
        finally:
            os.dup2(saved, 1)
            os.close(saved)
        file.seek(0)
        return file.read().decode(errors="replace")


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1].strip() if found else "unknown"
