"""Report the installed packages, the device, and which path each operation takes on this device and why."""

from __future__ import annotations

import pkgutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peftkit.environment import describe_environment
from peftkit.versions import newer_than_tested

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "datasets",
    "trl",
)


def diagnose() -> dict[str, Any]:
    """Collect the facts that ``peftkit doctor`` shows. Nothing is changed.

    Returns:
        A dictionary with ``environment`` (facts by name), ``packages`` (versions by name, ``None`` if not installed),
        ``warnings`` (sentences), ``cpu`` (the implementation of each CPU path, by name) and ``operations`` (a list of
        dictionaries with ``operation``, ``path`` and ``reason``).
    """
    return {
        "environment": describe_environment(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "warnings": [f"newer than tested: {name}" for name in newer_than_tested()],
        "cpu": _cpu_paths(),
        "operations": [_path(name, has_kernels) for name, has_kernels in operations().items()],
    }


def operations() -> dict[str, bool]:
    """Return whether each operation of ``peftkit_kernels`` has Triton kernels, by name.

    The operations are the folders of its ops and kinds of storage. Those with Triton kernels have a file ``triton_impl.py``.
    """
    from peftkit_kernels import ops, storage

    folders = [
        Path(parent, module.name)
        for parent in (*ops.__path__, *storage.__path__)
        for module in pkgutil.iter_modules([parent])
        if module.ispkg
    ]
    folders.sort(key=lambda folder: folder.name)
    return {folder.name: (folder / "triton_impl.py").is_file() for folder in folders}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_paths() -> dict[str, str]:
    from peftkit_kernels import gemm, native
    from peftkit_kernels.core import calibration
    from peftkit_kernels.ops.int8_compute_linear.torch_impl import multiplies_int8

    return {
        "element-wise passes, attention": native.obstacle() or f"native, {native.description()}",
        "float32 products": "oneDNN" if gemm.prefers_onednn() else "the BLAS of PyTorch",
        "int8 products": "8-bit instructions" if multiplies_int8() else "as float32",
        "GPU calibration": calibration.obstacle() or "valid",
    }


def _path(operation: str, has_kernels: bool) -> dict[str, str]:
    """Return the path of one operation, for bfloat16 on a GPU, or for float32 on the CPU if there is no GPU."""
    import torch

    from peftkit_kernels.core.dispatch import triton_obstacle

    on_gpu = torch.cuda.is_available()
    x = torch.empty(
        1, device="cuda" if on_gpu else "cpu", dtype=torch.bfloat16 if on_gpu else torch.float32
    )
    obstacle = triton_obstacle(operation, x) if has_kernels else triton_obstacle(operation)
    # without a GPU the automatic choice is torch, even if Triton's interpreter could run
    triton = on_gpu and obstacle is None
    return {
        "operation": operation,
        "path": "triton" if triton else "torch",
        "reason": obstacle or ("" if on_gpu else "there is no GPU"),
    }
