"""One run of the suite, in a process of its own: ``suite_row.py JSON`` prints one JSON document as its last line.

It imports torch, transformers and the library that it measures, so it also runs in the environment of another library.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from libraries import Sizes, build
from torch import Tensor

LEARNING_RATE = 1e-4


def main() -> None:
    """Run the point that the command line describes."""
    print(json.dumps(run(**json.loads(sys.argv[1]))))


def run(
    folder: str,
    method: str,
    library: str,
    batch: int,
    length: int,
    rank: int,
    adapters: int,
    checkpointing: bool,
    warm: int,
    steps: int,
) -> dict[str, Any]:
    """Train for ``warm`` steps and then ``steps`` timed ones.

    Returns:
        ``losses`` of every step; ``seconds`` of the timed steps; ``trainable``: number of trained parameters; ``without_gradient`` and
        ``leaking``: names of parameters whose gradient in the first step is not as it must be; ``peak_bytes``: how far the
        process's memory rose above that of the loaded model; ``allocator_bytes``: the same of the GPU's allocator, or ``None``;
        ``is_rounded``: whether the weights have 16 bits.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = Sizes(method, rank, adapters, checkpointing, dtype, device)
    torch.manual_seed(0)
    model, trained, _ = build(library, Path(folder), sizes)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    loaded = _reset_peak()
    losses, seconds, wrong = [], [], {}
    for step in range(warm + steps):
        ids = token_ids(vocabulary, batch, length, step).to(device)
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if step == 0:
            wrong = gradients(model, trained)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    peak = _peak()
    return {
        "losses": losses,
        "seconds": seconds[warm:],
        **wrong,
        "is_rounded": dtype is torch.bfloat16,
        "trainable": sum(p.numel() for p in parameters),
        "peak_bytes": peak[0] - loaded[0],
        "allocator_bytes": None if peak[1] is None else peak[1] - loaded[1],
    }


def token_ids(vocabulary: int, batch: int, length: int, step: int) -> Tensor:
    """``Int64[batch, length]``: the tokens of one step, the same for every library."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, vocabulary, (batch, length), generator=generator)


def gradients(model: Any, trained: set[str]) -> dict[str, list[str]]:
    """Names of parameters that must have a gradient other than zero and have none, and of those that must have none."""
    reached = {
        name
        for name, p in model.named_parameters()
        if p.grad is not None and bool(torch.count_nonzero(p.grad))
    }
    return {
        "without_gradient": sorted(trained - reached),
        "leaking": sorted(reached - trained),
    }


def _reset_peak() -> tuple[int, Any]:
    """Forget the peaks of the process and of the allocator; returns the bytes in use."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return _peak()


def _peak() -> tuple[int, Any]:
    """The peaks of the process's resident memory and of the GPU's allocator, in bytes."""
    import resource

    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status")
    if status.exists():  # this peak can be reset
        lines = status.read_text().splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    allocated = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return kib * 1024, allocated


if __name__ == "__main__":
    main()
