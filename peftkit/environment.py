"""Describe the machine and the library versions, for reports of measurements."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path


def describe_environment() -> dict[str, str | int]:
    """Return the device, processor, number of cores and threads, system, and library versions, by name."""
    import torch

    from peftkit import __version__

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "cpu": _cpu_model(),
        "cores": _cores(),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "peftkit": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "peft": version("peft"),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
