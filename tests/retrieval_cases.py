"""Tiny models that compare images with texts, and pairs of colours and their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import finetune_cases as cases
import tokenizers
import torch
import transformers as hf
import vision_chat_cases as vision

_TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
_IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


def _tokenizer(masked: bool) -> Any:
    found = cases.letter_tokenizer()
    # CLIP looks for the first end of text. Its number must not be 2, which older checkpoints have and which means something else.
    found.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <unk>", special_tokens=[("<unk>", 3)]
    )
    found.eos_token = "<unk>"
    found.model_input_names = ["input_ids", "attention_mask"] if masked else ["input_ids"]
    return found


def tiny(name: str) -> tuple[Any, Any]:
    """``"clip"`` or ``"siglip"`` with seeded weights, and its processor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "clip":
            model: Any = hf.CLIPModel(
                hf.CLIPConfig(text_config=_TEXT, vision_config=_IMAGE, projection_dim=16)
            )
        else:
            model = hf.SiglipModel(hf.SiglipConfig(text_config=_TEXT, vision_config=_IMAGE))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    tokenizer = _tokenizer(name == "clip")
    if name == "clip":
        pixels = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
        processor = hf.CLIPProcessor(hf.CLIPImageProcessorPil(**pixels), tokenizer)
    else:
        size = {"height": 16, "width": 16}
        processor = hf.SiglipProcessor(hf.SiglipImageProcessorPil(size=size), tokenizer)
    return model.train(), processor


def save(folder: Path, name: str) -> Path:
    """Save a tiny model with its processor."""
    model, processor = tiny(name)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def pairs(folder: Path, count: int = 12) -> list[dict[str, Any]]:
    """Images of three colours with their names."""
    files = list(vision.pictures(folder).items())
    return [{"image": files[i % 3][1], "text": files[i % 3][0]} for i in range(count)]
