"""Describe the machine and the library versions, for reports of measurements."""

from __future__ import annotations

import platform
from importlib.metadata import version

from peftkit.machine import cores, processor


def describe_environment() -> dict[str, str | int]:
    """Return the device, processor, number of cores and threads, system, and library versions, by name."""
    import torch

    from peftkit import __version__

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "cpu": processor() or platform.machine(),
        "cores": cores(),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "peftkit": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "peft": version("peft"),
    }
