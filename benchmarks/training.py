"""One benchmark run: some training steps of one provider, or the floor. Prints one JSON document.

    python benchmarks/training.py --case smollm2 --provider peftkit --steps 5

``--provider floor`` times only the products of a step with frozen weights (forward, input gradient, head), with ``torch.mm`` and with
the float32 product that peftkit chooses on this processor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import stepping
import torch
from cases import CASES, PROVIDERS, Case
from torch import nn


def main() -> None:
    """Run one provider on one case and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--provider", choices=[*PROVIDERS, "floor"], required=True)
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one to warm up")
    arguments = parser.parse_args()
    case = CASES[arguments.case]
    run = floor if arguments.provider == "floor" else train
    json.dump(run(case, arguments.provider, arguments.steps), sys.stdout)
    print()


def train(case: Case, provider: str, steps: int) -> dict[str, Any]:
    """Train; returns the loss of every step, times, and how far the peak memory rose above that of the loaded model."""
    model = case.build()
    torch.manual_seed(0)
    model = PROVIDERS[provider](model)
    model.train()
    vocab_size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator,union-attr]
    found = stepping.train(model, lambda step: case.batch(vocab_size, step), steps + 1)
    median = statistics.median(found.seconds[1:])
    return {
        "losses": found.losses,
        "step_seconds": median,
        "best_seconds": min(found.seconds[1:]),
        "first_seconds": found.seconds[0],
        "tokens_per_second": case.batch_size * case.sequence_length / median,
        "peak_bytes": found.peak_bytes,
        "trainable": found.trainable,
    }


def floor(case: Case, _provider: str, steps: int) -> dict[str, Any]:
    """Seconds of the products that every method needs: each frozen linear in the forward and for its input gradient."""
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


if __name__ == "__main__":
    main()
