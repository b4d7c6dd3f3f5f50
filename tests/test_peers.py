"""benchmarks/peers.md: what it calls measured is in the results, and what it calls predicted is what ``plan`` says."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from peftkit import LoraConfig, plan

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
PAGE = (FOLDER / "peers.md").read_text()
STEPS = json.loads((FOLDER / "results" / "gpu-h100.json").read_text())["steps"]
GIB = 2**30


def config(width, inner, layers, heads, tied):
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=tied,
        max_position_embeddings=131072,
        dtype="bfloat16",
    )


LLAMA_3B, LLAMA_8B = config(3072, 8192, 28, 24, True), config(4096, 14336, 32, 32, False)


@pytest.mark.parametrize("model", ["Llama-3.1-8B", "8 layers of Llama-3.1-8B", "Llama-3.2-1B"])
def test_measured_numbers_are_those_of_the_result(model):
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {model}, ")]
    rows = {row["provider"]: row for row in STEPS if row["model"] == model}
    for provider in {"peftkit", "PEFT", "full"} & rows.keys():
        row = rows[provider]
        assert f"{row['tokens_per_s']:,} tokens/s, {row['growth_gib']:.2f} GiB" in line


@pytest.mark.parametrize(
    ("model", "method", "options"),
    [
        (
            LLAMA_3B,
            LoraConfig(r=32, lora_alpha=64, target_modules=["q_proj", "v_proj"]),
            {"batch_size": 4, "seq_len": 768, "device": "L40S"},
        ),
        (LLAMA_3B, "full", {"batch_size": 4, "seq_len": 768, "device": "L40S"}),
        (
            LLAMA_8B,
            LoraConfig(r=16, lora_alpha=32),
            {"batch_size": 2, "seq_len": 4096, "device": "H100"},
        ),
        (
            LLAMA_8B,
            LoraConfig(r=8, lora_alpha=16),
            {"batch_size": 2, "seq_len": 2048, "device": "RTX 4090", "checkpointing": True},
        ),
        (
            LLAMA_8B,
            LoraConfig(r=8, lora_alpha=16),
            {
                "batch_size": 2,
                "seq_len": 2048,
                "device": "RTX 4090",
                "checkpointing": True,
                "base": "nf4",
            },
        ),
    ],
    ids=["PEFT, LoRA", "PEFT, full", "Automodel", "torchtune, LoRA", "torchtune, NF4"],
)
def test_predicted_memory_is_that_of_the_plan(model, method, options):
    made = plan(model, method, **{"base": "bf16", "optimizer": "adamw_fused", **options})
    assert f"{made.peak_bytes / GIB:.1f} GiB ({made.reserved_bytes / GIB:.1f})" in PAGE
