"""Measure a short run of one method on the demo's training batches, in a separate process.

The process runs ``python -m demo.compare METHOD OUT RESULT``, with METHOD one of ``peftkit``, ``peft``, ``full``. Each method gets
the same model, batches, optimiser and dtype. Memory is measured relative to the loaded model without the method.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo.child import run_child
from demo.files import read_json, write_json
from demo.settings import Folder, Settings, stored_settings

if TYPE_CHECKING:
    import torch
    from torch import nn

TITLES = {"peftkit": "peftkit", "peft": "plain PEFT", "full": "full fine-tuning"}
METHODS = tuple(TITLES)
WARM_UP_STEPS = 2
_STEP = "step"
"""The word before the number of steps in the lines that the process prints."""


def measure_in_process(
    method: str, folder: Folder, on_step: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Run ``measure`` in a new process, for the run in ``folder``.

    Args:
        method: One of ``METHODS``.
        folder: The run.
        on_step: Called with the number of finished steps.

    Raises:
        RuntimeError: The process failed. The message has its error output.
    """
    result = folder.phase(f"run-{method}")
    arguments = ["-m", "demo.compare", method, str(folder.path), str(result)]
    # the child imports the demo from the same path as this process, and nothing from the working directory
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
    began = time.perf_counter()

    def read(line: str) -> None:
        word, _, number = line.partition(" ")
        if word == _STEP:
            on_step(int(number))

    run_child(arguments, f"the {method} run", read, os.environ | path)
    measured = read_json(result) | {"seconds": time.perf_counter() - began}
    write_json(result, measured)
    return measured


def steps_of(settings: Settings) -> int:
    """Number of steps of each method, including those that are not timed."""
    return min(WARM_UP_STEPS + settings.compare_steps, settings.steps)


def measure(
    method: str,
    folder: Folder,
    settings: Settings,
    on_step: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Train a few steps with one method, and measure them.

    Args:
        method: One of ``METHODS``.
        folder: The run, for the base model.
        settings: The settings of the run.
        on_step: Called with the number of finished steps.

    Returns:
        ``step_seconds`` (median), ``tokens_per_second`` (median, without padding), ``peak_bytes`` (above the loaded model),
        ``trainable`` (number of parameters), and ``losses`` of all steps, which show that the methods did the same work.
    """
    import torch

    from demo.generator import make_examples
    from demo.model import device, load_model, load_tokenizer
    from demo.train import training_rows
    from peftkit.peak_memory import PeakMemory

    model, tokenizer = load_model(folder.base), load_tokenizer(folder.base)
    examples = make_examples("train", settings.train_pairs, settings.seed)
    rows = training_rows(examples, tokenizer, settings)
    memory = PeakMemory(device())
    held = memory.reset()

    torch.manual_seed(settings.seed)
    model = _with_method(method, model, settings)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    rate = settings.learning_rate if method != "full" else settings.learning_rate / 100
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0, fused=True)
    seconds, speeds, losses = [], [], []
    size = settings.batch_size
    for step in range(steps_of(settings)):
        batch_rows = rows[step * size : (step + 1) * size]
        began = time.perf_counter()
        losses.append(train_step(model, optimizer, trainable, batch_rows, tokenizer.pad_token_id))
        seconds.append(time.perf_counter() - began)
        speeds.append(sum(len(row["input_ids"]) for row in batch_rows) / seconds[-1])
        on_step(step + 1)
    timed = slice(WARM_UP_STEPS, None) if len(seconds) > WARM_UP_STEPS else slice(None)
    return {
        "step_seconds": statistics.median(seconds[timed]),
        "tokens_per_second": statistics.median(speeds[timed]),
        "peak_bytes": memory.peak() - held,
        "trainable": sum(p.numel() for p in trainable),
        "losses": losses,
    }


def train_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    trainable: list[torch.nn.Parameter],
    batch_rows: list[dict[str, Any]],
    pad_token_id: int,
) -> float:
    """Run one training step, and return its loss."""
    import torch

    from demo.dataset import collate

    batch = collate(batch_rows, pad_token_id)
    loss = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainable, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _with_method(method: str, model: nn.Module, settings: Settings) -> nn.Module:
    if method == "full":
        return model
    if method == "peftkit":
        return adapted(model, settings)
    if method == "peft":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(
            model,
            LoraConfig(
                r=settings.lora_r,
                lora_alpha=settings.lora_alpha,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        )
    raise ValueError(f"method={method!r} is not one of {', '.join(METHODS)}")


def adapted(model: nn.Module, settings: Settings) -> Any:
    """Wrap ``model`` with peftkit, with the settings of the demo."""
    from peft import LoraConfig

    from peftkit import wrap

    return wrap(
        model,
        LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_alpha, task_type="CAUSAL_LM"),
    )


def main(method: str, out: Path, result: Path) -> None:
    """Measure with the settings of the run in ``out``."""
    folder = Folder(out)
    settings = stored_settings(folder)
    measured = measure(method, folder, settings, lambda done: print(_STEP, done, flush=True))
    write_json(result, measured)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
