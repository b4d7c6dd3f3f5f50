"""The overhead of peftkit: seconds to import, wrap, load and explain, and microseconds of Python per layer.

    python benchmarks/run.py overhead

Each figure is compared with stock PEFT's. Both are measured in turn in the same process; the import is timed in fresh processes.
"""

from __future__ import annotations

import argparse
import gc
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from report import environment, machine, save
from torch import nn

WRAPPED_LAYERS = 32, 256
REPEATS = 5
CALLS = 2000
MODEL_LAYERS = 16
MODEL_CALLS = 20

HELP = "import, wrapping, loading and Python time per layer"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""


def run(arguments: argparse.Namespace) -> None:
    """Measure, save the result and print the table."""
    found = environment()
    imports, setup = import_seconds(), setup_seconds()
    torch.set_num_threads(1)  # the models below are too small for two threads
    result = {
        "environment": found,
        "import_seconds": imports,
        "setup_seconds": setup,
        "call_seconds": {
            f"{what}, {mode}": seconds
            for what, modes in (
                ("one tiny LoRA linear", layer_seconds()),
                ("a tiny decoder layer", model_seconds()),
            )
            for mode, seconds in modes.items()
        },
    }
    save(result, "overhead")
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """The overhead of peftkit as a Markdown table."""
    lines = [
        f"**overhead** ({machine(result['environment'])}; calls on one thread)",
        "",
        "| | peftkit | PEFT | / PEFT |",
        "|---|---|---|---|",
        f"| import (s) | {result['import_seconds']:.3f} | | |",
    ]
    for what, seconds in result["setup_seconds"].items():
        own, stock = seconds["peftkit"], seconds.get("peft")
        beside = " | | |" if stock is None else f" | {stock:.2f} | {own / stock:.2f} |"
        lines.append(f"| {what} (s) | {own:.2f}{beside}")
    for what, seconds in result["call_seconds"].items():
        own, stock = seconds["peftkit"], seconds["peft"]
        lines.append(f"| {what} (us) | {own * 1e6:.1f} | {stock * 1e6:.1f} | {own / stock:.2f} |")
    return "\n".join(lines)


def import_seconds() -> float:
    """Seconds that ``import peftkit`` takes in a fresh interpreter."""
    code = "import time; t = time.perf_counter(); import peftkit; print(time.perf_counter() - t)"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(REPEATS)
    ]
    return min(float(run.stdout) for run in runs)


def setup_seconds() -> dict[str, dict[str, float]]:
    """Seconds to adapt a tiny Llama, to load an adapter into it and to explain it, best of ``REPEATS`` in turn.

    PEFT's figure is that of ``get_peft_model`` or of ``PeftModel.from_pretrained``; PEFT has nothing like ``explain``.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    from peftkit import explain, load_adapter, wrap
    from peftkit.find.targets import all_linear

    found: dict[str, dict[str, float]] = {}
    for layers in WRAPPED_LAYERS:
        targets = all_linear(_tiny_llama(layers)).names

        def config(targets: list[str] = targets) -> LoraConfig:
            return LoraConfig(r=16, target_modules=targets)

        with tempfile.TemporaryDirectory() as folder:
            get_peft_model(_tiny_llama(layers), config()).save_pretrained(folder)
            runs: dict[tuple[str, str], Callable[[nn.Module], Any]] = {
                ("wrapping", "peft"): lambda model: get_peft_model(model, config()),
                ("wrapping", "peftkit"): lambda model: wrap(model, config()),
                ("loading an adapter of", "peft"): lambda model: PeftModel.from_pretrained(
                    model, folder
                ),
                ("loading an adapter of", "peftkit"): lambda model: load_adapter(model, folder),
            }
            best = dict.fromkeys([*runs, ("explaining", "peftkit")], math.inf)
            for _ in range(REPEATS):
                for key, run in runs.items():
                    model = _tiny_llama(layers)
                    gc.collect()  # else the garbage of one run would be collected in another
                    best[key] = min(best[key], timed(lambda m=model, run=run: run(m)))
                adapted = wrap(_tiny_llama(layers), config())
                key = "explaining", "peftkit"
                best[key] = min(best[key], timed(lambda m=adapted: explain(m)))
        for (what, library), seconds in best.items():
            found.setdefault(f"{what} {layers} layers", {})[library] = seconds
    return found


def _tiny_llama(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=2,
            vocab_size=1024,
        )
    )


def layer_seconds() -> dict[str, dict[str, float]]:
    """Seconds per forward, and per forward and backward, of one LoRA linear that is so small that only Python takes time."""
    from peft import LoraConfig, get_peft_model

    from peftkit import accelerate

    def layer(fuse: bool) -> nn.Module:
        model = get_peft_model(
            nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"])
        )
        return (accelerate(model) if fuse else model).base_model.model[0]

    x = torch.randn(2, 8, requires_grad=True)
    layers = {"peft": layer(False), "peftkit": layer(True)}
    modes = {
        "forward": lambda module: module(x),
        "forward and backward": lambda module: module(x).sum().backward(),
    }
    return interleaved(layers, modes, CALLS)


def model_seconds() -> dict[str, dict[str, float]]:
    """As ``layer_seconds`` for a language model with 16 x 16 matrices: seconds per decoder layer."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from peftkit import accelerate
    from peftkit.find.targets import all_linear

    def model(fuse: bool) -> nn.Module:
        config = LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=MODEL_LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=64,
        )
        base = LlamaForCausalLM(config)
        wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=all_linear(base).names))
        return accelerate(wrapped) if fuse else wrapped

    tokens = torch.arange(4)[None]

    @torch.no_grad()
    def forward(module: nn.Module) -> Any:
        return module(input_ids=tokens)

    modes = {
        "forward without gradients": forward,
        "forward and backward": lambda module: module(
            input_ids=tokens, labels=tokens
        ).loss.backward(),
    }
    rows = interleaved({"peft": model(False), "peftkit": model(True)}, modes, MODEL_CALLS)
    return {
        mode: {name: value / MODEL_LAYERS for name, value in row.items()}
        for mode, row in rows.items()
    }


def interleaved(
    modules: dict[str, nn.Module], modes: dict[str, Callable[[nn.Module], Any]], calls: int
) -> dict[str, dict[str, float]]:
    """Seconds per call of every module in every mode: the best of ``REPEATS`` rounds, in which the modules run in turn."""
    result = {}
    for mode, run in modes.items():
        best = dict.fromkeys(modules, math.inf)
        for _ in range(REPEATS):
            for name, module in modules.items():
                seconds = timed(lambda m=module, run=run: [run(m) for _ in range(calls)]) / calls
                best[name] = min(best[name], seconds)
        result[mode] = best
    return result


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
