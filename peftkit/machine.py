"""Describe the hardware: processor, instruction sets, cores, memory and GPUs. A fact that cannot be read is ``None``."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_CPUINFO = Path("/proc/cpuinfo")
_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")

_FLAGS = {
    "AMX": "amx_tile",
    "AVX-512": "avx512f",
    "AVX2": "avx2",
    "SVE": "sve",
    "NEON": "asimd",
}
"""Instruction sets for vectors and matrices, and the flag by which the Linux kernel lists each of them."""


def describe_machine() -> dict[str, Any]:
    """Return the facts on which speed and memory depend.

    Returns:
        ``processor`` (its model), ``architecture``, ``instructions`` (names of instruction sets, as "AVX2, AVX-512"), ``cores``
        that this process may use, ``memory_bytes``, ``available_bytes``, ``memory_limit_bytes`` (of the container; ``None``
        also means that there is no limit), and ``gpus``, as ``gpus`` returns them.
    """
    total, available = _memory()
    return {
        "processor": processor(),
        "architecture": platform.machine() or None,
        "instructions": _instructions(),
        "cores": cores(),
        "memory_bytes": total,
        "available_bytes": available,
        "memory_limit_bytes": _memory_limit(),
        "gpus": gpus(),
    }


def processor() -> str | None:
    """Return the model of the processor."""
    named = _cpuinfo("model name") or _cpuinfo("Model")
    if named is None and platform.system() == "Darwin":
        named = _sysctl("machdep.cpu.brand_string")
    if named is None and platform.processor() not in (platform.machine(), "arm", "i386"):
        named = platform.processor()  # on some systems only the architecture
    return named or None


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpus() -> list[dict[str, Any]]:
    """Return the GPUs that torch can use.

    Returns:
        For each GPU ``name``, ``kind`` (``"cuda"``, ``"rocm"`` or ``"mps"``), ``memory_bytes`` and ``capability``: NVIDIA's
        compute capability as ``"9.0"``, AMD's architecture as ``"gfx942"``.
    """
    import torch

    if torch.cuda.is_available():
        kind = "rocm" if torch.version.hip else "cuda"
        return [_gpu(index, kind) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        return [{"name": "Apple GPU", "kind": "mps", "memory_bytes": None, "capability": None}]
    return []


def _gpu(index: int, kind: str) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"name": None, "kind": kind, "memory_bytes": None, "capability": None}
    try:
        properties = torch.cuda.get_device_properties(index)
    except (RuntimeError, AssertionError):  # the driver lists a GPU that cannot be used
        return found
    numbers = f"{properties.major}.{properties.minor}"
    return found | {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": numbers if kind == "cuda" else getattr(properties, "gcnArchName", None),
    }


def _cpuinfo(key: str) -> str | None:
    """Return the first value of ``key`` in the Linux kernel's description of the processor."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == key and value.strip():
            return value.strip()
    return None


def _sysctl(name: str) -> str | None:
    try:
        command = ["sysctl", "-n", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _instructions() -> str | None:
    flags = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
    found = [name for name, flag in _FLAGS.items() if flag in flags]
    if found:
        return ", ".join(found)
    import torch

    # without the kernel's list, torch's own choice of code says which instructions there are
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512"):
        return "AVX-512"
    if capability == "AVX2":
        return "AVX2"
    return "NEON" if platform.machine().lower() in ("arm64", "aarch64") else None


def _memory() -> tuple[int | None, int | None]:
    """Return the bytes of memory: all, and what is available now."""
    try:
        import psutil

        found = psutil.virtual_memory()
    except Exception:  # psutil raises many kinds of errors on systems that hide their memory
        return None, None
    return found.total, found.available


def _memory_limit() -> int | None:
    try:
        limit = _MEMORY_LIMIT.read_text().strip()
    except OSError:
        return None
    return int(limit) if limit.isdecimal() else None
