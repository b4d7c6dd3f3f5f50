"""Attention time with a prefix and without: forward and backward at 1,024 tokens, and decoding from a long cache.

    python benchmarks/run.py prefix

Each attention is called as transformers calls it, on the shapes of SmolLM2's heads, with and without 16 virtual tokens, with torch's
``sdpa`` and with peftkit's attention. ``joined keys`` is the simple way to add a prefix: it copies the keys behind the prefix and
builds a mask. Rounds are interleaved, and the best time counts. Results are compared before any timing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from report import environment, machine, run_script, save
from torch import Tensor, nn

BATCH, HEADS, KEY_HEADS, HEAD_SIZE = 1, 9, 3, 64
TOKENS, PREFIX, CACHE = 1024, 16, 4096
SCALE = HEAD_SIZE**-0.5
ROUNDS = 15

HELP = "attention with a prefix and without"

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""


def run(arguments: argparse.Namespace) -> None:
    """Measure in a separate process, save the result and print the table."""
    result = {"environment": environment(), **run_script("prefix.py")}
    save(result, "prefix")
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """The times as a Markdown table, each next to its ratio to the same attention without a prefix."""
    lines = [
        f"**attention, 16 virtual tokens** ({machine(result['environment'])})",
        "",
        "| | forward and backward, 1,024 tokens (ms) | / no prefix | decoding, 4,096 cached tokens (us) | / no prefix |",
        "|---|---|---|---|---|",
    ]
    steps, decodes = result["step_seconds"], result["decode_seconds"]
    for name, step in steps.items():
        plain = name.partition(",")[0]
        lines.append(
            f"| {name} | {step * 1e3:.2f} | {step / steps[plain]:.2f} | {decodes[name] * 1e6:.0f} | "
            f"{decodes[name] / decodes[plain]:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Compare the results, measure the times and print them as one JSON document."""
    attentions = {
        f"{name}{kind}": attention_module(name == "peftkit", options)
        for name in ("torch", "peftkit")
        for kind, options in (
            ("", None),
            (", prefix", {}),
            (", gated prefix", {"gate": True}),
        )
    }
    calls: dict[str, Call] = {name: as_transformers(m) for name, m in attentions.items()}
    calls["torch, joined keys"] = joined(attentions["torch, prefix"])
    trained = {
        name: [p for p in module.parameters() if p.requires_grad]
        for name, module in attentions.items()
    }
    trained["torch, joined keys"] = trained["torch, prefix"]
    q, k, v, dout = inputs(TOKENS, TOKENS)
    compare(calls, q, k, v)

    def step(name: str) -> None:
        out = calls[name](q, k, v)
        torch.autograd.grad(out, (q, k, v, *trained[name]), dout)

    @torch.no_grad()
    def decode(name: str) -> None:
        calls[name](*cache)

    cache = inputs(1, CACHE)[:3]
    result = {
        "step_seconds": interleaved(list(calls), step, 1),
        "decode_seconds": interleaved(list(calls), decode, 20),
    }
    json.dump(result, sys.stdout)
    print()


def attention_module(fused: bool, options: dict[str, Any] | None) -> Any:
    """One Llama attention with SmolLM2's heads; the weights and prefixes are the same each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from peftkit import PrefixConfig, accelerate
    from peftkit.prefix import add_prefixes

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HEADS * HEAD_SIZE,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        intermediate_size=64,
        num_hidden_layers=1,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    if options is not None:
        settings = PrefixConfig(num_virtual_tokens=PREFIX, init_std=1.0, **options)
        add_prefixes(model, settings)
    attention = (accelerate(model) if fused else model).model.layers[0].self_attn
    for parameter in attention.parameters():
        if parameter.requires_grad and parameter.dim() == 1:
            nn.init.constant_(parameter, 0.5)  # an open gate
    return attention


def as_transformers(attention: Any) -> Call:
    """The attention call as the module makes it in its forward."""
    from transformers import AttentionInterface

    name = attention.config._attn_implementation
    function = AttentionInterface()[name]
    return lambda q, k, v: function(attention, q, k, v, None, scaling=SCALE)[0]


def joined(attention: Any) -> Call:
    """The attention that concatenates the prefix with copies of the keys and values, with the mask that this needs."""
    prefix = attention.virtual_tokens.adapters["default"]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (
            torch.cat([own.expand(BATCH, -1, -1, -1), t], 2).repeat_interleave(
                HEADS // KEY_HEADS, 1
            )
            for own, t in ((prefix.key, k), (prefix.value, v))
        )
        mask = None
        if q.shape[2] > 1:
            own = torch.ones(q.shape[2], PREFIX, dtype=torch.bool)
            mask = torch.cat([own, torch.ones(q.shape[2], q.shape[2]).tril().bool()], 1)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=SCALE).transpose(1, 2)

    return call


def inputs(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values with the strides that projections give them, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int, heads: int) -> Tensor:
        return torch.randn(BATCH, tokens, heads, HEAD_SIZE, generator=generator)

    q, k, v = draw(queries, HEADS), draw(keys, KEY_HEADS), draw(keys, KEY_HEADS)
    leaves = [t.transpose(1, 2).requires_grad_() for t in (q, k, v)]
    return leaves[0], leaves[1], leaves[2], draw(queries, HEADS)


def compare(calls: dict[str, Call], q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ``SystemExit`` if two ways to compute the same attention differ by more than rounding."""
    with torch.no_grad():
        results = {name: call(q, k, v) for name, call in calls.items()}
    pairs = [
        ("torch", "peftkit"),
        ("torch, joined keys", "torch, prefix"),
        ("torch, joined keys", "peftkit, prefix"),
        ("torch, gated prefix", "peftkit, gated prefix"),
    ]
    for a, b in pairs:
        error = (results[a] - results[b]).abs().max() / results[a].abs().max()
        limit = 2 * math.sqrt(TOKENS) * torch.finfo(q.dtype).eps
        if not error <= limit:
            raise SystemExit(
                f"{b} differs from {a} by {error:.3g}, more than {limit:.3g} allowed; nothing was timed"
            )


def interleaved(names: list[str], run: Callable[[str], None], repetitions: int) -> dict[str, float]:
    """The best seconds of every name over ``ROUNDS`` rounds, in which the names run in turn."""
    best = dict.fromkeys(names, math.inf)
    for _ in range(ROUNDS):
        for name in names:
            start = time.perf_counter()
            for _ in range(repetitions):
                run(name)
            best[name] = min(best[name], (time.perf_counter() - start) / repetitions)
    return best


if __name__ == "__main__":
    main()
