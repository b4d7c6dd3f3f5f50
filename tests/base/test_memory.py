"""The memory that ``load_base`` needs, measured in a process of its own. Linux only: it reads ``/proc``."""

import sys

import base_memory
import pytest
from markers import slow_if

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SLACK = 4 * 2**20
"""Objects of Python and the allocator, which do not grow with the model."""


def assert_within_bounds(found, largest):
    for peak in (found["peak"], found["peak_anonymous"]):
        assert found["stored"] < peak <= found["stored"] + 1.2 * largest + SLACK
    assert found["resident"] <= 1.05 * found["stored"] + SLACK


@pytest.mark.parametrize("base", slow_if("nf4".__ne__, ["nf4", "int8", "fp8", "bf16"]))
def test_loading_needs_the_loaded_model_and_the_largest_tensor(tmp_path, base):
    sizes = base_memory.SIZES_3B | {"vocab_size": 1000, "num_hidden_layers": 1}
    largest = base_memory.write_checkpoint(tmp_path, sizes)

    assert_within_bounds(base_memory.measured(tmp_path, base), largest)


def test_a_step_has_no_copy_of_the_head_and_no_logits(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "head_dim": 128, "vocab_size": 128000}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 1}
    head = base_memory.write_checkpoint(tmp_path, sizes | heads)
    tokens = 512

    found = base_memory.measured(tmp_path, "nf4", tokens)

    assert found["step"] < head == tokens * sizes["vocab_size"] * 4


@pytest.mark.slow
def test_three_billion_parameters_load_and_train_in_the_promised_memory(tmp_path):
    largest = base_memory.write_checkpoint(tmp_path, base_memory.SIZES_3B)

    found = base_memory.measured(tmp_path, "nf4", tokens=512)

    assert_within_bounds(found, largest)
    assert found["peak_of_process"] < 4.5 * 2**30
    assert found["swap"] == 0
    assert_within_bounds(base_memory.measured(tmp_path, "int8"), largest)
