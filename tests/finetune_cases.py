"""What the tests of fine-tuning share: tiny models with tokenizers in folders, small data, recipes and the command."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import models
import tokenizers
import torch
import transformers as hf
from PIL import Image
from typer.testing import CliRunner

from peftkit.cli.main import app

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", "<u>", "<a>"]


def letter_tokenizer(chat: bool = False) -> Any:
    """A tokenizer of single characters, with the special tokens of the tiny models and of ``CHAT_TEMPLATE``."""
    vocabulary = {token: number for number, token in enumerate(SPECIAL)}
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789.,:?!-+"
    vocabulary |= {letter: number for number, letter in enumerate(letters, start=len(SPECIAL))}
    assert len(vocabulary) <= models.VOCAB_SIZE
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        additional_special_tokens=["<u>", "<a>"],
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_model(folder: Path, name: str, chat: bool = False) -> Path:
    """Save the tiny model ``name``, or ``"masked bert"``, with a tokenizer; returns the folder."""
    if name == "masked bert":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = hf.BertForMaskedLM(models.tiny("bert").config)
    else:
        model = models.tiny(name)
    if name in ("bert", "vit"):
        # A checkpoint of the backbone alone, so that heads are new.
        model = model.base_model
    model.save_pretrained(folder)
    if name == "vit":
        hf.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    else:
        letter_tokenizer(chat).save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chats(count: int = 12) -> list[dict[str, Any]]:
    """Conversations: repeat a letter."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"say {chr(97 + i % 26)}"},
                {"role": "assistant", "content": chr(97 + i % 26) * 3},
            ]
        }
        for i in range(count)
    ]


def tagged(count: int = 48) -> list[dict[str, Any]]:
    """Words, of which the capital ones are names."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        words = [draw.choice(["a", "b", "X", "Y"]) for _ in range(5)]
        rows.append({"tokens": words, "tags": ["B-BIG" if w.isupper() else "O" for w in words]})
    return rows


def images(folder: Path, count: int = 8) -> Path:
    """A folder with images of three colours, each colour in a folder of its own."""
    for name, colour in (("red", (250, 20, 20)), ("green", (20, 250, 20)), ("blue", (20, 20, 250))):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            shade = tuple(max(0, c - 5 * number) for c in colour)
            Image.new("RGB", (16, 16), shade).save(folder / name / f"{number}.png")
    return folder


def pairs(count: int = 32) -> list[dict[str, Any]]:
    """Pairs of texts: small letters and the same number of other capital letters."""
    return [
        {"anchor": chr(97 + i % 16) * 3 + " ?", "positive": chr(65 + i % 16) * 3}
        for i in range(count)
    ]


def recipe(model: Path, task: Any, train: Any, out: Path, **changes: Any) -> dict[str, Any]:
    """A recipe with few steps and one short sample. ``changes`` replace whole keys, except those of ``training`` and ``data``."""
    training = {"max_steps": 4, "batch_size": 4, "log_every": 1, "lr": 1e-2}
    values: dict[str, Any] = {
        "model": str(model),
        "task": task,
        "strategy": {"name": "lora", "r": 4},
        "data": {"train": str(train) if isinstance(train, Path) else train},
        "training": training | {"samples": 1, "sample_tokens": 8},
        "out": str(out),
    }
    for name in ("data", "training"):
        values[name] |= changes.pop(name, {})
    return values | changes


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    """Write a recipe as YAML (JSON is YAML)."""
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def run(*arguments: Any, code: int = 0) -> str:
    """Run the command ``peftkit``; returns what it printed."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output
