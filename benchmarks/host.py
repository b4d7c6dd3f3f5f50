"""What the host pays for each op on a GPU: microseconds of Python and launches, without a GPU.

    python benchmarks/run.py host
    python benchmarks/run.py host --json host.json

peftkit takes the way that it takes on an H100, launch plans included, up to the call that would start a kernel, which is only
counted. Launches are those of the sizes of Llama-3.1-8B, on meta tensors. Times are those of tiny tensors on the CPU, for which
torch's own operations take almost no time but their dispatch; PEFT runs the same step on the same tensors. The GPU driver's part
of a launch is missing on both sides. As kernels do not run, what they would write is whatever was in memory, often numbers so small that
a CPU multiplies them fifty times slower; these are flushed to zero.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from overhead import timed
from report import environment, machine, save
from torch import Tensor, nn

from peftkit_kernels.core.calibration import Calibration
from peftkit_kernels.core.launch import Target, counting

# with any width the schedule of large layers
H100 = Target("cuda:90", 132, Calibration(fused_width=0))
RANK = 16


class Sizes(NamedTuple):
    """The sizes of a decoder layer, and where its tensors are."""

    batch: int
    tokens: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    device: str
    dtype: torch.dtype


REAL = Sizes(1, 4096, 4096, 14336, 32, 8, "meta", torch.bfloat16)
TINY = Sizes(34, 8, 16, 32, 2, 1, "cpu", torch.float32)
"""More than one chunk of rows, so that partial sums are added as for many tokens, but short sequences, so that attention has next to
nothing to compute. Not 16 bits, whose products are slow on a CPU."""
LINEARS = 8
"""A backward has a fixed cost, which is that of a model and not of a linear, so a chain of linears is measured."""
CALLS, ROUNDS = 10, 80

HELP = "microseconds of Python and launches of each op on a GPU"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--json", type=Path, help="also write the rows to this file")


def run(arguments: argparse.Namespace) -> None:
    """Measure, save the result and print the table."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    result = {"environment": environment(), "rows": rows()}
    save(result, "host")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = [
        f"**host time** ({machine(result['environment'])}; one thread, tiny tensors, configured for an H100)",
        "",
        "| forward and backward | peftkit (us) | PEFT (us) | / PEFT | Triton launches |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        own, stock = row["peftkit_us"], row["peft_us"]
        lines.append(
            f"| {row['what']} | {own:.0f} | {stock:.0f} | {own / stock:.2f} | {row['launches']} |"
        )
    return "\n".join(lines)


def rows() -> list[dict[str, Any]]:
    """One row for each thing measured: ``what``, ``peftkit_us``, ``peft_us``, ``launches``."""
    found = []
    with counting(H100) as counter:
        for what, (build, parts) in CASES.items():
            real = build(True, REAL)
            real()
            before = counter.launches
            real()
            launches = (counter.launches - before) // parts
            own, stock = build(True, TINY), build(False, TINY)
            best = [math.inf, math.inf]
            for _ in range(ROUNDS):
                for i, step in enumerate((own, stock)):
                    step()
                    seconds = timed(lambda step=step: [step() for _ in range(CALLS)]) / CALLS
                    best[i] = min(best[i], seconds)
            own_us, stock_us = (seconds * 1e6 / parts for seconds in best)
            row = {"what": what, "peftkit_us": own_us, "peft_us": stock_us, "launches": launches}
            found.append(row)
    return found


def linears(fuse: bool, sizes: Sizes, *, dropout: float = 0.0) -> Callable[[], None]:
    """A step of a chain of LoRA linears."""
    with torch.device(sizes.device):
        chain = [nn.Linear(sizes.hidden, sizes.hidden, bias=False) for _ in range(LINEARS)]
        base = nn.Sequential(*chain).to(sizes.dtype)
    names = [str(i) for i in range(LINEARS)]
    return step_of(
        adapted(base, fuse, names, dropout).base_model.model, tensor(sizes, sizes.hidden)
    )


def decoder_layer(fuse: bool, sizes: Sizes, *, dropout: float = 0.0) -> Callable[[], None]:
    """A step of one decoder layer of a Llama with LoRA on all linears."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaModel

    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.mlp,
        num_hidden_layers=1,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=64,
        attn_implementation="sdpa",
    )
    with torch.device(sizes.device):
        base = LlamaModel(config).to(sizes.dtype)
    targets = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    layer = adapted(base, fuse, targets, dropout).base_model.model.layers[0]
    angles = [tensor(sizes, sizes.hidden // sizes.heads)[:1] for _ in range(2)]
    x = tensor(sizes, sizes.hidden)
    return step_of(layer, x, position_embeddings=tuple(angles), attention_mask=None)


def adapted(base: nn.Module, fuse: bool, targets: list[str], dropout: float) -> Any:
    """The model with LoRA in its own dtype: PEFT's, or fused."""
    from peft import LoraConfig, get_peft_model

    from peftkit import accelerate

    config = LoraConfig(r=RANK, lora_dropout=dropout, target_modules=targets)
    base_dtype = next(base.parameters()).dtype
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(base_dtype)
    return (accelerate(model) if fuse else model).train()


def step_of(module: nn.Module, x: Tensor, **others: Any) -> Callable[[], None]:
    """A forward and backward of ``module``."""
    x.requires_grad_()
    grad = torch.empty_like(module(x, **others), requires_grad=False)

    def step() -> None:
        module(x, **others).backward(grad)

    return step


def tensor(sizes: Sizes, width: int) -> Tensor:
    """``[batch, tokens, width]``."""
    shape = sizes.batch, sizes.tokens, width
    return torch.zeros(shape, dtype=sizes.dtype, device=sizes.device)


CASES: dict[str, tuple[Callable[[bool, Sizes], Callable[[], None]], int]] = {
    "LoRA linear, 4096 x 4096": (linears, LINEARS),
    "LoRA linear with dropout": (functools.partial(linears, dropout=0.1), LINEARS),
    "decoder layer of Llama-3.1-8B": (decoder_layer, 1),
    "the same with dropout": (functools.partial(decoder_layer, dropout=0.1), 1),
}
"""What is measured: the function that builds a step, and the number of equal parts that the step has."""
