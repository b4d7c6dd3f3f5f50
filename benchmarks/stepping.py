"""One way to run and time training steps in a process: seconds, losses, and how far a step's memory rises above the loaded model."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

LEARNING_RATE = 1e-4


class Steps(NamedTuple):
    """What ``train`` measured.

    Attributes:
        losses: Of every step.
        seconds: Of every step, the first ones too.
        peak_bytes: How far the process's memory rose above that of the loaded model.
        trainable: Number of trained parameters.
    """

    losses: list[float]
    seconds: list[float]
    peak_bytes: int
    trainable: int


def train(
    model: Any,
    batch_of: Callable[[int], dict[str, Tensor]],
    steps: int,
    after_backward: Callable[[int], None] = lambda step: None,
) -> Steps:
    """Train with AdamW.

    Args:
        model: The model.
        batch_of: Returns the batch of a step.
        steps: The number of steps.
        after_backward: Is called between the backward and the optimiser of each step, with its number.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    read_weights(model)
    loaded = reset_peak()
    seconds, losses = [], []
    for step in range(steps):
        batch = batch_of(step)
        start = time.perf_counter()
        losses.append(train_step(model, optimiser, batch, lambda step=step: after_backward(step)))
        seconds.append(time.perf_counter() - start)
    return Steps(losses, seconds, peak_bytes() - loaded, sum(p.numel() for p in trained))


def train_step(
    model: Any,
    optimiser: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    after_backward: Callable[[], None] = lambda: None,
) -> float:
    """Run one step and return its loss as a number, so that the graph is freed afterwards, as in Trainer."""
    loss = model(**batch).loss
    loss.backward()
    after_backward()
    optimiser.step()
    optimiser.zero_grad()
    return loss.item()


def read_weights(model: Any) -> None:
    """Read each page of the weights: a checkpoint is mapped, and pages that nobody has read would count as memory of the first step."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu":
            raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            raw[::4096].sum()


def token_ids(vocabulary: int, batch: int, length: int, step: int) -> Tensor:
    """``Int64[batch, length]``: the random tokens of one step, the same for every provider."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, vocabulary, (batch, length), generator=generator)


def reset_peak() -> int:
    """Forget the peaks of this process and of the GPU's allocator, so that loading does not count; returns the process's bytes."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return peak_bytes()


def peak_bytes() -> int:
    """The peak of this process's resident memory since ``reset_peak``."""
    import resource

    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status")
    if status.exists():  # this peak can be reset
        lines = status.read_text().splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return kib * 1024


def allocated_peak(run: Callable[[], object]) -> int:
    """How far torch's allocations on the CPU rise during a call, in bytes, by its profiler; the same on every machine.

    The call is slower under the profiler and needs more memory: measure time and the process's memory before. Memory that C code takes
    for itself is not counted.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    used = most = 0
    for _, change in changes:
        used += change
        most = max(most, used)
    return most
