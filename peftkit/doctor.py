"""Report the machine, the installed packages, what speed and memory to expect, and which path each operation takes and why."""

from __future__ import annotations

import pkgutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peftkit.environment import describe_environment
from peftkit.expectations import expectations
from peftkit.machine import describe_machine
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
        A dictionary with ``machine`` (as ``describe_machine`` returns it), ``environment`` (facts by name), ``packages``
        (versions by name, ``None`` if not installed), ``warnings`` (sentences), ``cpu`` and ``gpu`` (the implementation of each
        CPU and GPU path, by name), ``expectations`` (as ``peftkit.expectations`` returns them) and ``operations`` (a list of
        dictionaries with ``operation``, ``path`` and ``reason``).
    """
    from torch import get_num_threads

    from peftkit_kernels import gemm, native

    machine = describe_machine()
    return {
        "machine": machine,
        "environment": describe_environment(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "warnings": [f"newer than tested: {name}" for name in newer_than_tested()],
        "cpu": _cpu_paths(),
        "gpu": _gpu_paths(machine["gpus"]),
        "expectations": expectations(
            machine,
            onednn=gemm.onednn_obstacle() is None,
            native=native.obstacle() is None,
            threads=get_num_threads(),
        ),
        "operations": [_path(name, has_kernels) for name, has_kernels in operations().items()],
    }


def operations() -> dict[str, bool]:
    """Return whether each operation of ``peftkit_kernels`` has Triton kernels, by name.

    The operations are the folders of its ops and kinds of storage. Those that run on torch alone have a ``torch_impl.py`` and no kernels.
    """
    from peftkit_kernels import ops, storage

    folders = [
        Path(parent, module.name)
        for parent in (*ops.__path__, *storage.__path__)
        for module in pkgutil.iter_modules([parent])
        if module.ispkg
    ]
    folders = [f for f in folders if (f / "op.py").is_file() or (f / "kind.py").is_file()]
    folders.sort(key=lambda folder: folder.name)
    return {
        folder.name: (folder / "kernels.py").is_file() or not (folder / "torch_impl.py").is_file()
        for folder in folders
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_paths() -> dict[str, str]:
    from peftkit_kernels import gemm, native

    return {
        "element-wise passes, attention": native.obstacle() or f"native, {native.description()}",
        "float32 products": _products(gemm.onednn_obstacle()),
        "int8 products": _int8_products(),
    }


def _int8_products() -> str:
    from peftkit_kernels import native
    from peftkit_kernels.storage.int8.product.torch_impl import multiplies_int8

    if multiplies_int8():
        return "8-bit instructions"
    return "native, with 16-bit instructions" if native.has_int8_products() else "as float32"


def _products(onednn_obstacle: str | None) -> str:
    if onednn_obstacle is None:
        return "oneDNN, because MKL would run only its AVX2 code on this processor"
    return f"the BLAS of PyTorch, because {onednn_obstacle}"


def _gpu_paths(gpus: list[dict[str, Any]]) -> dict[str, str]:
    """Return the attention of each GPU with the reason, and whether the calibration file is valid."""
    import torch

    from peftkit_kernels.core import calibration
    from peftkit_kernels.ops.attention import device_obstacle, switched_off

    found = {}
    for index, gpu in enumerate(gpus):
        obstacle = "cuDNN needs an NVIDIA GPU"
        if gpu["kind"] == "cuda":
            obstacle = switched_off() or device_obstacle(torch.device("cuda", index))
        found[f"attention, GPU {index}"] = (
            f"the backend that PyTorch chooses, because {obstacle}"
            if obstacle
            else "cuDNN (dense causal attention in 16 bits; otherwise the backend that PyTorch chooses)"
        )
    return found | {"calibration": calibration.obstacle() or "valid"}


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
