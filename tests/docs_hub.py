"""A Hugging Face cache with tiny models under the ids that the documentation uses, so that its code runs as it is displayed."""

from pathlib import Path

import export_cases
import models
import torch
import transformers as hf

REVISION = "0" * 40
_SIZES = {
    "vocab_size": 400,
    "hidden_size": 64,  # a row of NF4 consists of whole blocks of 64
    "intermediate_size": 128,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "max_position_embeddings": 2048,
    "dtype": "bfloat16",
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}: {{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant: {% endif %}"
)


def build(cache: Path) -> None:
    """Write the cache to the folder ``cache``, to be used as ``HF_HUB_CACHE``."""
    settings = models.tiny("llama").config.to_dict() | _SIZES
    llama = hf.LlamaForCausalLM, hf.LlamaConfig(**settings), "smollm"
    qwen = hf.Qwen3ForCausalLM, hf.Qwen3Config(**settings | {"model_type": "qwen3"}), "qwen2"
    found = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": llama,
        "Qwen/Qwen3-0.6B": qwen,
        "Qwen/Qwen3-8B": qwen,
    }
    for name, (cls, config, split) in found.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / REVISION
        torch.manual_seed(0)
        cls(config).to(torch.bfloat16).save_pretrained(snapshot)
        tokenizer = export_cases.byte_level(split)
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(snapshot)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(REVISION)


def use(cache: Path, monkeypatch) -> None:
    """Let huggingface_hub and transformers read this cache."""
    import huggingface_hub.constants
    import transformers.utils.hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    for name in ("TRANSFORMERS_CACHE", "PYTORCH_TRANSFORMERS_CACHE"):
        if hasattr(transformers.utils.hub, name):
            monkeypatch.setattr(transformers.utils.hub, name, str(cache))
