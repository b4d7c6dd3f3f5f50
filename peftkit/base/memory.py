"""Give memory that was freed while loading back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back() -> None:
    """Return freed memory to the system. glibc keeps the space of tensors under 32 MiB, which then counts as the process's memory."""
    gc.collect()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc has this function, musl does not
            libc.malloc_trim(0)
