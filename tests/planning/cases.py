"""Small configs for plans, and the cases of the benchmark."""

import importlib.util
import sys
from pathlib import Path

from transformers import Gemma3TextConfig, LlamaConfig

_FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}


def llama(layers=2, **changes):
    return LlamaConfig(
        **_SIZES | changes, num_hidden_layers=layers, architectures=["LlamaForCausalLM"]
    )


def gemma3(layers):
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * layers
    return Gemma3TextConfig(
        **_SIZES,
        num_hidden_layers=layers,
        layer_types=kinds[:layers],
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=32,
        architectures=["Gemma3ForCausalLM"],
    )


def benchmark():
    """benchmarks/memory_plans.py."""
    sys.path.insert(0, str(_FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("memory_plans", _FOLDER / "memory_plans.py")
        module = sys.modules["memory_plans"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(_FOLDER))
        sys.modules.pop("report", None)
        sys.modules.pop("memory_plans", None)
    return module
