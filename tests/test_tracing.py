"""Models under tracers and modes: torch operations run there, and give the numbers of an ordinary forward.

A native call in a trace could end the process, so the traces are made in a child process.
"""

import subprocess
import sys

import methods
import models
import pytest
import torch
import traced
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lab.testing import assert_no_worse_than
from peftkit_kernels import native

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """By family and state: what ``traced.outputs_of`` gives."""
    file = tmp_path_factory.mktemp("traced") / "outputs.pt"
    result = subprocess.run(
        [sys.executable, traced.__file__, file], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, (result.returncode, result.stderr[-2000:])
    return torch.load(file)


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize("state", ["wrapped", "merged"])
def test_a_traced_model_is_as_near_to_float64_as_the_stock_model(outputs, name, state):
    case = outputs[f"{name} {state}"]
    assert torch.equal(case["before"], case["after"]), "the trace changed the model"
    assert_no_worse_than(case["traced"], case["stock"], case["exact"], "logits")
    assert torch.equal(case["traced"], case["loaded"])
    assert_no_worse_than(case["traced on twice the batch"], case["stock"], case["exact"], "logits")


def test_a_counter_of_operations_sees_all_of_them():
    model = methods.trained(methods.wrapped("LoRA", "llama")).train()
    batch = models.batch("llama")
    x = torch.ones(2, 8)
    with FlopCounterMode(display=False) as counter:
        assert not native.supports(x)
        loss = model(**batch).loss
        loss.backward()
    assert counter.get_total_flops() > 0
    assert torch.allclose(loss, model(**batch).loss)


def test_fake_tensors_have_a_shape_and_no_values():
    model = methods.trained(methods.wrapped("all three", "llama"))
    batch = models.batch("llama")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        output = model(**{name: mode.from_tensor(value) for name, value in batch.items()})
    assert isinstance(output.logits, FakeTensor)
    assert output.logits.shape == (*batch["input_ids"].shape, models.VOCAB_SIZE)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_a_forward_with_loss_on_the_meta_device(name):
    model = methods.wrapped("LoRA", name).to("meta").train()
    batch = models.batch(name)
    del batch["attention_mask"]  # transformers reads the values of a mask
    output = model(**{key: value.to("meta") for key, value in batch.items()})
    assert output.logits.device.type == output.loss.device.type == "meta"
    output.loss.backward()
    assert all(p.grad.device.type == "meta" for p in model.parameters() if p.requires_grad)
