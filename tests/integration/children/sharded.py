"""Started by torchrun in two processes: a user's own FSDP2 over wrapped models, adapters included. Writes losses and gradients."""

import sys
from pathlib import Path
from typing import Any

import models
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed import init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from peftkit import accelerate
from peftkit.finetune.blocks import find_stacks

CASES = {
    "llama": {},
    "llama, checkpointed": {},
    "bert": {},
    "gpt2": {"use_dora": True},
    "gemma3": {},
}
"""A tiny model, and options of its adapters."""


def adapted(name: str) -> Any:
    """The model of a case, with the same weights and adapters in every process."""
    config = LoraConfig(r=4, target_modules="all-linear", **CASES[name])
    model: Any = get_peft_model(models.tiny(name.split(",")[0]), config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise + (parameter.data if parameter.dim() == 1 else 0.0))
    return model


def row(name: str, number: int) -> dict[str, Any]:
    """One row of the batch of a case."""
    batch = models.batch(name.split(",")[0])
    return {key: tensor[number : number + 1] for key, tensor in batch.items()}


def main() -> None:
    """Write what each process found to the folder that is the first argument."""
    init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    rank = torch.distributed.get_rank()
    found = {}
    for name in CASES:
        model = accelerate(adapted(name))
        if "checkpointed" in name:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        base = model.get_base_model()
        blocks = [b for s in find_stacks(model) for b in base.get_submodule(s.name).children()]
        for group in (*blocks, model):
            fully_shard(group, mesh=mesh)
            group.set_force_sum_reduction_for_comms(True)  # gloo computes no mean
        loss = model(**row(name, rank)).loss
        loss.backward()
        grads = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad}
        found[name] = {"loss": loss.detach(), "grads": grads}
    torch.save(found, Path(sys.argv[1]) / f"{rank}.pt")


if __name__ == "__main__":
    main()
