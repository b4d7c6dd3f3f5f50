"""Two processes under torchrun (gloo): DistributedDataParallel and the Trainer over a wrapped model."""

import models
import numpy as np
import pytest
import torch
from integration.support import (
    LLAMA_FORWARD,
    LOSS_TOLERANCE,
    ROOT,
    largest_difference,
    times,
    tiny_peft,
    trainer,
    two_processes,
)

CHILD = ROOT / "tests" / "integration" / "children" / "distributed.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two processes found, and the folder they wrote to."""
    folder = tmp_path_factory.mktemp("ddp")
    return two_processes(CHILD, folder), folder


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_equal_those_of_one_process_on_the_joint_batch(ranks, checkpointed):
    results = [result[f"gradients, checkpointed={checkpointed}"] for result in ranks[0]]
    assert largest_difference(*results) == 0.0

    batch = models.batch("llama")
    labels = (batch["labels"][:, 1:] != -100).sum(1)
    assert labels[0] != labels[1], "equal halves would hide a wrong weight"
    stock = joint_gradients(tiny_peft(fused=False), batch)
    truth = joint_gradients(tiny_peft(fused=False).double(), batch)
    for name, grad in results[0].items():
        scale = truth[name].abs().max()
        error_of_stock = max(
            (stock[n] - truth[n]).abs().max() / truth[n].abs().max() for n in truth
        )
        allowed = 2 * error_of_stock + torch.finfo(torch.float32).eps
        assert (grad - truth[name]).abs().max() <= allowed * scale, name


def test_trainer_losses_equal_one_process_on_joint_batches(ranks, tmp_path):
    results, folder = [result["trainer"] for result in ranks[0]], ranks[1]
    alone = trainer(tiny_peft(fused=False), tmp_path, max_steps=10, per_device_train_batch_size=2)
    alone.train()

    assert all(result["distributed"] for result in results)
    assert all(result["calls"] == times(LLAMA_FORWARD, 10) for result in results)
    assert results[0]["losses"] != results[1]["losses"]
    joint = np.mean([result["losses"] for result in results], axis=0)
    np.testing.assert_allclose(joint, alone.losses, rtol=0, atol=LOSS_TOLERANCE)
    assert largest_difference(*(result["adapter"] for result in results)) == 0.0
    assert (folder / "run" / "checkpoint-10" / "adapter_model.safetensors").is_file()
    assert not list((folder / "run" / "checkpoint-10").glob("model*"))


def joint_gradients(model, batch):
    """Adapter gradients of one process."""
    model(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
