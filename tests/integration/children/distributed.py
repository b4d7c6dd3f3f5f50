"""One process of two, started by torchrun: a Trainer run, then one DistributedDataParallel backward on half a batch.

Usage: torchrun --nproc_per_node 2 distributed.py OUT (a folder; every process writes OUT/RANK.pt)
"""

import sys
from pathlib import Path

import models
import torch
import torch.distributed as dist
from integration.support import adapter_tensors, fused_calls, tiny_peft, trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def train(folder: Path) -> dict[str, object]:
    """Ten steps of the Trainer, one example a process and step."""
    run = trainer(
        tiny_peft(fused=True),
        folder / "run",
        max_steps=10,
        per_device_train_batch_size=1,
        save_strategy="steps",
        save_steps=10,
        ddp_backend="gloo",
    )
    with fused_calls() as calls:
        run.train()
    return {
        "distributed": isinstance(run.model_wrapped, DistributedDataParallel),
        "losses": run.losses,
        "calls": calls,
        "adapter": adapter_tensors(run.model),
    }


def gradients(*, checkpointed: bool) -> dict[str, Tensor]:
    """The adapter gradients of the batch's two rows, one row a process."""
    model = tiny_peft(fused=True)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    data = models.batch("llama")
    count = (data["labels"][:, 1:] != -100).sum()
    row = dist.get_rank()
    mine = {name: tensor[row : row + 1] for name, tensor in data.items()}
    distributed = DistributedDataParallel(model)
    loss = distributed(**mine, num_items_in_batch=count).loss
    # Gradients are averaged over the processes, and the loss is each process's part of a sum.
    (loss * dist.get_world_size()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def main() -> None:
    """Run both and save what the test compares."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    result = {"trainer": train(folder)}
    for checkpointed in (False, True):
        result[f"gradients, checkpointed={checkpointed}"] = gradients(checkpointed=checkpointed)
    torch.save(result, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
