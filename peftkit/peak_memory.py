"""Measure the current and the peak memory of a process."""

from __future__ import annotations

import sys
from pathlib import Path

_PROC = Path("/proc/self")


class PeakMemory:
    """The current memory and the peak since ``reset``, in bytes: of the GPU if the model is on a GPU, else of the process.

    On Linux the resident set is read from ``/proc``. On other systems the peak of the process cannot be reset, so ``peak`` is
    the peak since the start of the process. The two are equal if nothing before ``reset`` needed more memory.

    Args:
        device: ``"cpu"``, or ``"cuda"`` for the current GPU.
    """

    def __init__(self, device: str):
        self._on_gpu = device.startswith("cuda")

    def now(self) -> int:
        """Return the bytes that are allocated now."""
        if self._on_gpu:
            import torch

            return torch.cuda.memory_allocated()
        if (_PROC / "status").is_file():
            return _status("VmRSS")
        import psutil

        return psutil.Process().memory_info().rss

    def reset(self) -> int:
        """Start a new measurement of the peak, and return the bytes that are allocated now."""
        if self._on_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()
        elif (_PROC / "clear_refs").exists():
            (_PROC / "clear_refs").write_text("5")  # documented in proc(5): resets VmHWM
        return self.now()

    def peak(self) -> int:
        """Return the peak since ``reset``, in bytes."""
        if self._on_gpu:
            import torch

            return torch.cuda.max_memory_allocated()
        if (_PROC / "status").is_file():
            return _status("VmHWM")
        if sys.platform == "win32":
            import psutil

            return psutil.Process().memory_info().peak_wset
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def _status(field: str) -> int:
    for line in (_PROC / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
