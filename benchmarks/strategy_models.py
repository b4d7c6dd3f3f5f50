"""The models of ``strategies.py``: from packages, or pretrained here on images without labels; and the exact matches of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

IA3_OF_VIT = {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]}
"""As in the paper: keys, values and the inner layer of the MLP (Liu et al., 2022, arXiv:2205.05638)."""
PRETRAINING_STEPS = 300


def prepare(name: str, folder: Path, smoke: bool) -> Path:
    """The folder of a model, written to ``folder`` unless its package has one. ``smoke`` keeps two blocks of it."""
    return {"smollm2": _smollm2, "minilm": _minilm, "digits": _digits}[name](folder, smoke)


def _smollm2(folder: Path, smoke: bool) -> Path:
    from learning import model_folder
    from transformers import AutoModelForCausalLM

    folder.mkdir()
    whole = model_folder("records", folder)
    return _cut(whole, folder / "cut", AutoModelForCausalLM) if smoke else whole


def _minilm(folder: Path, smoke: bool) -> Path:
    from learning import model_folder
    from transformers import AutoModel

    whole = model_folder("intents", folder)
    return _cut(whole, folder, AutoModel) if smoke else whole


def _cut(whole: Path, folder: Path, auto_class: Any, blocks: int = 2) -> Path:
    """The first blocks of a model, with its tokenizer."""
    from transformers import AutoTokenizer

    auto_class.from_pretrained(whole, num_hidden_layers=blocks).save_pretrained(folder)
    AutoTokenizer.from_pretrained(whole).save_pretrained(folder)
    return folder


def _digits(folder: Path, smoke: bool) -> Path:
    """A ViT for images of 8 x 8 pixels that was pretrained by contrast (SimCLR) on the images that are not held out."""
    import strategy_data
    import torch
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    import peftkit

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2 if smoke else 6,
        num_attention_heads=4,
    )
    ViTModel(config).save_pretrained(folder / "random")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder / "random")
    images = [{"image": row["image"]} for row in strategy_data.digits(1437, 360).train]
    run = peftkit.train(
        {
            "model": str(folder / "random"),
            "task": {"name": "contrastive_images", "temperature": 0.1},
            "strategy": "full",
            "data": {"train": images, "preview": 0},
            "training": {
                "max_steps": 4 if smoke else PRETRAINING_STEPS,
                "batch_size": 16 if smoke else 128,
                "lr": 1e-3,
                "checkpoint_every": PRETRAINING_STEPS,
            },
            "out": str(folder / "pretraining"),
        }
    )
    assert run.weights is not None
    return run.weights


def exact_matches(run: Path, base: Path, rows: list[dict[str, Any]], size: int = 25) -> float:
    """The share of prompts that are answered with the right JSON object, key for key and value for value.

    Args:
        run: The folder of a run, or ``base`` for the model without training.
        base: The folder of the base model, which has the tokenizer.
        rows: ``prompt`` and ``completion``.
        size: Prompts in a batch.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peftkit import load_adapter, load_base

    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    place = run / "model" if (run / "model").is_dir() else base
    model = load_base(place, "fp32", auto_class=AutoModelForCausalLM)
    if (run / "adapter").is_dir():
        model = load_adapter(model, run / "adapter")
    model.eval()
    longest = max(len(tokenizer(row["completion"]).input_ids) for row in rows) + 1
    right = 0
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}],
                tokenize=False,
                add_generation_prompt=True,
            )
            for row in part
        ]
        inputs = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        answers = tokenizer.batch_decode(
            tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True
        )
        right += sum(
            _object(answer) == json.loads(row["completion"])
            for answer, row in zip(answers, part, strict=True)
        )
    return right / len(rows)


def _object(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
