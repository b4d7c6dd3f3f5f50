"""How long a point trains until it has a loss, in a process of its own: ``suite_target.py JSON`` prints one JSON document as its last line.

The text is that of ``texts.py``; a model without a tokenizer reads its bytes. The loss is that of held-out topics, every few steps; the
time is that of the training steps alone. Unlike in ``suite_row.py`` each method starts as its library starts it, and has a learning rate
of its own.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from libraries import Sizes, build
from stepping import train_step
from texts import text_blocks
from torch import Tensor

RATES = {"full": 1e-4, "partial": 5e-4, "prefix": 1e-2}
OTHER_RATE = 1e-3
"""Learning rates of AdamW by method. Another rate may reach the loss sooner."""

EVERY, HELD_OUT = 10, 8
"""Steps between two evaluations, and the number of held-out blocks."""


def main() -> None:
    """Train the point that the command line describes."""
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
    target: float,
    most: int,
) -> dict[str, Any]:
    """Train until the held-out loss is at most ``target``, for at most ``most`` steps.

    Returns:
        ``reached``; ``steps`` and ``seconds`` of training; ``held_out``: pairs of the number of steps and the held-out loss;
        ``learning_rate``.
    """
    on_gpu = torch.cuda.is_available()
    dtype, device = (torch.bfloat16, "cuda") if on_gpu else (torch.float32, "cpu")
    torch.manual_seed(0)
    sizes = Sizes(method, rank, adapters, checkpointing, dtype, device)
    model = build(library, Path(folder), sizes, own_start=True).model
    encode = encoder(Path(folder), model.get_input_embeddings().weight.shape[0])
    blocks, held_out = (ids.to(device) for ids in text_blocks(encode, length))
    rate = RATES.get(method, OTHER_RATE)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    seconds = 0.0
    found = [(0, held_out_loss(model, held_out))]
    for step in range(1, most + 1):
        if found[-1][1] <= target:
            break
        rows = [((step - 1) * batch + i) % len(blocks) for i in range(batch)]
        start = time.perf_counter()
        train_step(model, optimiser, {"input_ids": blocks[rows], "labels": blocks[rows]})
        seconds += time.perf_counter() - start
        if step % EVERY == 0 or step == most:
            found.append((step, held_out_loss(model, held_out)))
    return {
        "reached": found[-1][1] <= target,
        "steps": found[-1][0],
        "seconds": seconds,
        "held_out": found,
        "learning_rate": rate,
    }


def encoder(folder: Path, vocabulary: int) -> Callable[[str], Sequence[int]]:
    """The tokenizer of a folder, or, if it has none, the bytes of a text."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((folder / name).exists() for name in names):
        return lambda text: [byte % vocabulary for byte in text.encode()]
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return lambda text: [*tokenizer(text)["input_ids"], *end]


def held_out_loss(model: Any, held_out: Tensor) -> float:
    """The mean loss of the first held-out blocks, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        losses = [
            model(input_ids=ids, labels=ids).loss.item() for ids in held_out[:HELD_OUT].split(2)
        ]
    model.train()
    return statistics.mean(losses)


if __name__ == "__main__":
    main()
