"""Started by torchrun in two processes: gradients and clipping of a divided model that has a single number among its weights."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from peftkit.finetune.divided import WithoutWrapping, groups_of_parts, whole, whole_weights
from peftkit.finetune.sharding import shard


class Model(nn.Module):
    """Blocks, and a factor on their result."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return (x * self.factor).square().sum()


def model() -> Model:
    """The same weights in every process."""
    torch.manual_seed(0)
    return Model()


def rows() -> torch.Tensor:
    """Rows for both processes."""
    return torch.arange(8.0).view(2, 4) / 8


def step(made: Any, loss: torch.Tensor, clip: Any) -> Any:
    """A step of SGD with small gradients; returns their norm before that."""
    groups = groups_of_parts([{"params": list(made.parameters())}])
    optimizer = torch.optim.SGD(groups, lr=0.1)
    loss.backward()
    norm = clip([p for group in groups for p in group["params"]], 0.5)
    optimizer.step()
    return norm


def main() -> None:
    """Write what each process found to the folder that is the first argument."""
    state = PartialState(cpu=True, backend="gloo")
    made = model()
    shard(made, False)
    accelerator = WithoutWrapping(cpu=True)
    norm = step(made, made(rows()[state.process_index][None]), accelerator.clip_grad_norm_)
    gradient = whole(made.factor.grad) if made.factor.grad is not None else None
    found = {"norm": norm, "factor": gradient, "own": made.factor.detach()}
    torch.save(
        found | {"weights": whole_weights(made)},
        Path(sys.argv[1]) / f"{state.process_index}.pt",
    )


if __name__ == "__main__":
    main()
