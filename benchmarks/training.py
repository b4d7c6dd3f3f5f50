"""One run in a process of its own: some training steps of one provider, or the floor; prints one JSON document.

    python benchmarks/training.py --case smollm2 --provider peftkit --steps 5

``--provider floor`` times the frozen products of a step alone (forward, input gradient, head), by ``torch.mm`` and by the
float32 product that peftkit chooses on this processor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cases import CASES, FAMILY_CASES, PROVIDERS, Case
from torch import Tensor, nn


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=[*CASES, *FAMILY_CASES], required=True)
    parser.add_argument("--provider", choices=[*PROVIDERS, "floor"], required=True)
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one that warms up")
    arguments = parser.parse_args()
    case = (CASES | FAMILY_CASES)[arguments.case]
    run = floor if arguments.provider == "floor" else train
    json.dump(run(case, arguments.provider, arguments.steps), sys.stdout)
    print()


def train(case: Case, provider: str, steps: int) -> dict[str, Any]:
    """Loss and time of every step, and how far the resident memory rose above that of the loaded model."""
    model = case.build()
    torch.manual_seed(0)
    model = PROVIDERS[provider](model)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    vocab_size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator,union-attr]
    loaded_bytes = reset_peak()
    seconds, losses = [], []
    for step in range(steps + 1):
        batch = case.batch(vocab_size, step)
        start = time.perf_counter()
        losses.append(train_step(model, optimizer, batch))
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    return {
        "losses": losses,
        "step_seconds": median,
        "best_seconds": min(seconds[1:]),
        "first_seconds": seconds[0],
        "tokens_per_second": case.batch_size * case.sequence_length / median,
        "peak_bytes": peak_bytes() - loaded_bytes,
        "trainable": sum(p.numel() for p in trained),
    }


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]
) -> float:
    """One step and its loss; nothing of its graph outlives it, as in Trainer."""
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def floor(case: Case, _provider: str, steps: int) -> dict[str, Any]:
    """Seconds of the products no method can leave out: each frozen linear forward and for its input gradient."""
    from peftkit_kernels.gemm import matmul_nn, matmul_nt

    model = case.build()
    rows = case.batch_size * case.sequence_length
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]
    inputs = {
        w.shape: (torch.randn(rows, w.shape[1]), torch.randn(rows, w.shape[0])) for w in weights
    }
    products = {
        "torch": (lambda x, w: torch.mm(x, w.t()), torch.mm),
        "chosen": (matmul_nt, matmul_nn),
    }
    seconds: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(steps + 1):
        for name, (forward, backward) in products.items():
            start = time.perf_counter()
            for weight in weights:
                x, dy = inputs[weight.shape]
                forward(x, weight)
                backward(dy, weight)
            seconds[name].append(time.perf_counter() - start)
    return {f"{name}_seconds": statistics.median(values[1:]) for name, values in seconds.items()}


def reset_peak() -> int:
    """Forget the most resident memory this process ever had (loading counts not); returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """Most resident memory of this process since ``reset_peak``."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
