"""What the integration tests share: data, trainers that record losses, counting of fused calls, child processes."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import models
import peft
import torch
import transformers as hf
from torch import Tensor, nn

import peftkit
from peftkit_kernels import native

TEXTS = [
    "the cat sat on the mat",
    "a dog ran over the green hill to the river",
    "the river runs to the sea",
    "two birds sat on the old wall and sang",
    "the old dog sat",
    "a green bird ran over the wall to the cat",
]
"""What TRL's trainers are given."""

LOSS_TOLERANCE = 1e-5
"""How far 20 optimiser steps may take the losses of a fused model from those of stock PEFT."""

FUSED_OPS = (
    "peftkit.fuse.compute.lora_linear",
    "peftkit.fuse.compute.lora_qkv",
    "peftkit.fuse.compute.lora_swiglu_mlp",
    "peftkit.fuse.compute.nf4_linear",
    "peftkit.fuse.compute.int8_linear",
    "peftkit.fuse.norm.frozen_rms_norm",
    "peftkit.fuse.norm.frozen_layer_norm",
    "peftkit.fuse.loss.lazy.linear_cross_entropy",
    "peftkit.fuse.attention.attention",
)

LLAMA_FORWARD = Counter(
    lora_qkv=2, lora_linear=2, lora_swiglu_mlp=2, frozen_rms_norm=5, linear_cross_entropy=1
)
"""Fused calls in one forward of the tiny Llama with labels: per layer q/k/v, o, the MLP and two norms; one last norm."""

WIDE_FORWARD = LLAMA_FORWARD + Counter(attention=0 if native.obstacle() else 2)
"""As ``LLAMA_FORWARD`` for ``wide_llama`` and sequences long enough for the fused attention."""

ROOT = Path(__file__).parents[2]


@contextmanager
def fused_calls() -> Iterator[Counter[str]]:
    """Count the calls of every fused op, by its name, and those of stock PEFT's own forward, as ``"peft"``."""
    calls: Counter[str] = Counter()

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    patches = []
    for path in FUSED_OPS:
        module, name = path.rsplit(".", 1)
        original = getattr(import_module(module), name)
        patches.append(mock.patch(path, counted(name, original)))
    stock = peft.tuners.lora.layer.Linear
    patches.append(mock.patch.object(stock, "forward", counted("peft", stock.forward)))
    for patch in patches:
        patch.start()
    try:
        yield calls
    finally:
        for patch in patches:
            patch.stop()


def times(calls: Counter[str], count: int) -> Counter[str]:
    """``calls`` of one forward as those of ``count`` forwards."""
    return Counter({name: number * count for name, number in calls.items()})


def adapter_config(**changes: Any) -> peft.LoraConfig:
    """LoRA on all linears of a tiny Llama, with a B that is not zero, so that a wrong B gradient or scale shows at once."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": targets,
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
    }
    return peft.LoraConfig(**settings | changes)


def wide_llama() -> nn.Module:
    """The tiny Llama with heads of 32, which the fused attention takes and heads of 8 are too narrow for."""
    settings = models.tiny("llama").config.to_dict() | {"head_dim": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)  # scores far from uniform
    return model.train()


def tiny_peft(*, fused: bool, base: nn.Module | None = None, **changes: Any) -> peft.PeftModel:
    """The tiny Llama with the same adapter each time, through ``peftkit.wrap`` or plain PEFT."""
    base = models.tiny("llama") if base is None else base
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if fused:
            return peftkit.wrap(base, adapter_config(**changes), strict=True)
        return peft.get_peft_model(base, adapter_config(**changes))


def rows(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Examples for the tiny Llama, ``Int64[12]`` each, with ends of different lengths ignored by mask and labels."""
    examples = []
    for index in range(-(-count // models.BATCH_SIZE)):
        data = models.batch("llama", seed=1000 * seed + index)
        for row in range(models.BATCH_SIZE):
            example = {name: tensor[row].clone() for name, tensor in data.items()}
            example["labels"][: 2 * (index % 4)] = -100
            examples.append(example)
    return examples[:count]


def long_rows(count: int) -> list[dict[str, Tensor]]:
    """Examples of ``Int64[24]``: three whole ones, then one with three positions of padding, and so on."""
    examples = []
    for index in range(count):
        data = models.batch("llama", seed=index)
        rows_of = (0, 1) if index % 4 == 3 else (0, 0)
        examples.append(
            {name: torch.cat([tensor[row] for row in rows_of]) for name, tensor in data.items()}
        )
    return examples


class RecordingTrainer(hf.Trainer):
    """A Trainer that keeps the loss of every micro-batch as it was computed, unrounded and not averaged."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch, recorded."""
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


def arguments(folder: Path, **changes: Any) -> hf.TrainingArguments:
    """Training arguments for a few quiet steps on the CPU."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return hf.TrainingArguments(**settings | changes)


def trainer(model: nn.Module, folder: Path, **changes: Any) -> RecordingTrainer:
    """A recording Trainer over 16 examples; ``changes`` go to ``TrainingArguments``, or to the Trainer where it knows them."""
    own = {name: changes.pop(name) for name in ("compute_metrics",) if name in changes}
    return RecordingTrainer(
        model,
        arguments(folder, **changes),
        train_dataset=rows(16),
        eval_dataset=rows(6, seed=1),
        **own,
    )


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable parameters by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest absolute difference between two sets of tensors with equal names."""
    assert a.keys() == b.keys()
    assert a
    return max((a[name] - b[name]).abs().max().item() for name in a)


def two_processes(script: Path, folder: Path) -> list[Any]:
    """What a script has written to ``folder`` in two processes started by torchrun, each to a file named after its rank."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    run_python(*launcher, script, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def run_python(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter with one thread and no network, from the project's root.

    Args:
        arguments: After ``python``.
        check: Fail with the child's output where it does not end with 0.
    """
    paths = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    if check:
        assert result.returncode == 0, (
            f"{command} ended with {result.returncode}:\n{result.stderr[-4000:]}"
        )
    return result
