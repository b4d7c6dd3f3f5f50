"""One run of the suite, in a process of its own: ``suite_row.py JSON`` prints one JSON document as its last line.

It imports torch, transformers and the library that it measures, so it also runs in the environment of another library.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import instructions
import torch
from libraries import Sizes, build
from stepping import allocated_peak, token_ids, train
from torch import Tensor


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
        process's memory rose above that of the loaded model; ``allocator_bytes``: the same of torch's allocator, on the CPU in two
        more steps; ``is_rounded``: whether the weights have 16 bits; ``instructions``: what ran on the CPU.
    """
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    sizes = Sizes(method, rank, adapters, checkpointing, dtype, "cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    model, trained, _ = build(library, Path(folder), sizes)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    loaded = torch.cuda.memory_allocated() if on_gpu else 0
    wrong: dict[str, list[str]] = {}

    def batch_of(step: int) -> dict[str, Tensor]:
        ids = token_ids(vocabulary, batch, length, step).to(sizes.device)
        return {"input_ids": ids, "labels": ids}

    def look(step: int) -> None:
        if step == 0:
            wrong.update(gradients(model, trained))

    found = train(model, batch_of, warm + steps, look)
    is_own = library in ("peftkit", "plain torch")
    return {
        "losses": found.losses,
        "seconds": found.seconds[warm:],
        **wrong,
        "is_rounded": on_gpu,
        "trainable": found.trainable,
        "peak_bytes": found.peak_bytes,
        "allocator_bytes": torch.cuda.max_memory_allocated() - loaded
        if on_gpu
        else _allocated(model, batch_of, is_own),
        "instructions": instructions.in_use(is_own, "compiled" in library) if not on_gpu else {},
    }


def _allocated(model: Any, batch_of: Any, is_own: bool) -> int:
    """How far torch's allocations on the CPU rise in two steps with a new optimiser."""
    if is_own:
        from peftkit_kernels.core import workspace

        workspace.release()
    return allocated_peak(lambda: train(model, batch_of, 2))


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


if __name__ == "__main__":
    main()
