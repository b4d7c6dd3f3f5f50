"""Give memory that was freed while loading back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back() -> None:
    """Return freed memory to the system. glibc keeps the space of tensors under 32 MiB, which then counts as the process's memory.

    Decoding leaves gigabytes of fragmented free memory, and training that allocates from these fragments is slower: after 300
    requests of the demo, 2.77 ms instead of 2.33 ms per token on two Zen 5 cores.
    """
    gc.collect()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc has this function, musl does not
            libc.malloc_trim(0)
