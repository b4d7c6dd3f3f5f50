"""The memory meter."""

import mmap
import sys

import numpy as np
import pytest

from peftkit.base.memory import give_back
from peftkit.peak_memory import PeakMemory


def test_peak_sees_a_block_that_is_gone_and_reset_forgets_it():
    memory = PeakMemory("cpu")
    held = memory.reset()
    with mmap.mmap(-1, 64 * 2**20) as block:  # new pages: an array may lie in freed memory
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        assert memory.now() - held > 60 * 2**20
    assert memory.peak() - held > 60 * 2**20
    assert memory.reset() - held < 16 * 2**20
    assert memory.peak() - held < 16 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps freed memory this way")
def test_freed_memory_below_a_block_in_use_is_given_back():
    memory = PeakMemory("cpu")
    blocks = [np.ones(2**16, dtype=np.uint8) for _ in range(1024)]
    held = memory.now()
    del blocks[:-1]  # the last one keeps the heap from shrinking by itself
    give_back()
    assert held - memory.now() > 48 * 2**20
    assert blocks[-1].all()
