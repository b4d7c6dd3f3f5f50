"""Tiny vision-language models with processors, and conversations about images of one colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import finetune_cases as cases
import torch
import transformers as hf
from PIL import Image

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
COLOURS = {"red": (250, 20, 20), "green": (20, 250, 20), "blue": (20, 20, 250)}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
_TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tokenizer() -> Any:
    """Single letters, and the tokens around images."""
    found = cases.letter_tokenizer()
    extra = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    extra += [f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)]
    found.add_tokens(["\n"])
    found.add_special_tokens(
        {"additional_special_tokens": [*found.additional_special_tokens, *extra]}
        if hasattr(found, "additional_special_tokens")
        else {"extra_special_tokens": [*found.extra_special_tokens, *extra]}
    )
    return found


def _llava(tokens: Any) -> tuple[Any, Any]:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_VISION, num_hidden_layers=3),
        text_config=hf.LlamaConfig(**_TEXT),
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    pixels = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessorPil(**pixels),
        tokens,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return hf.LlavaForConditionalGeneration(config), processor


def _idefics3(tokens: Any) -> tuple[Any, Any]:
    config = hf.Idefics3Config(
        vision_config={**_VISION, "num_hidden_layers": 2},
        text_config=hf.LlamaConfig(**_TEXT).to_dict(),
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    processor = hf.Idefics3Processor(
        hf.Idefics3ImageProcessorPil(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
        ),
        tokens,
        image_seq_len=4,
        chat_template=TEMPLATE,
    )
    return hf.Idefics3ForConditionalGeneration(config), processor


BUILDERS = {"llava": _llava, "idefics3": _idefics3}


def tiny(name: str) -> tuple[Any, Any]:
    """A tiny model with seeded weights, and its processor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = BUILDERS[name](tokenizer())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train(), processor


def save(folder: Path, name: str) -> Path:
    """Save a tiny model with its processor."""
    model, processor = tiny(name)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def pictures(folder: Path) -> dict[str, str]:
    """An image of each colour: its name and its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (16, 16), colour).save(folder / f"{name}.png")
    return {name: str(folder / f"{name}.png") for name in COLOURS}


def chats(folder: Path, count: int = 12) -> list[dict[str, Any]]:
    """Questions about the colour of an image."""
    files = list(pictures(folder).items())
    return [
        {"images": [files[i % 3][1]], "prompt": "colour?", "completion": files[i % 3][0]}
        for i in range(count)
    ]
