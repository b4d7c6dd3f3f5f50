"""The memory meter."""

import numpy as np

from peftkit.demo.memory import PeakMemory


def test_peak_sees_a_block_that_is_gone_and_reset_forgets_it():
    memory = PeakMemory("cpu")
    held = memory.reset()
    block = np.ones(64 * 2**20, dtype=np.uint8)
    assert memory.now() - held > 60 * 2**20
    del block
    assert memory.peak() - held > 60 * 2**20
    assert memory.reset() - held < 16 * 2**20
    assert memory.peak() - held < 16 * 2**20
