"""Tokenizers and models for the tests of tasks without labels."""

import random
from pathlib import Path
from typing import Any

import finetune_cases as cases
import models
import tokenizers
import transformers as hf
from PIL import Image

MARKS = 10


def t5_with_marks(folder: Path) -> Path:
    """The tiny T5 with the marks that span corruption needs; returns the folder."""
    model = models.tiny("t5")
    model.save_pretrained(folder)
    marked_tokenizer().save_pretrained(folder)
    return folder


def marked_tokenizer() -> Any:
    """The tokenizer of single characters, with ``<extra_id_0>`` and so on."""
    tokenizer = cases.letter_tokenizer()
    tokenizer.add_tokens([f"<extra_id_{number}>" for number in range(MARKS)])
    assert len(tokenizer) <= models.VOCAB_SIZE
    return tokenizer


def word_tokenizer() -> Any:
    """A tokenizer of words that are made of pieces of at most two letters."""
    vocabulary = {token: number for number, token in enumerate(cases.SPECIAL)}
    letters = "abcdefghijklmnopqrstuvwxyz"
    for piece in [*letters, *(f"##{a}" for a in letters)]:
        vocabulary[piece] = len(vocabulary)
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.decoder = tokenizers.decoders.WordPiece()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def vit_with_pooler(folder: Path) -> Path:
    """The tiny ViT as the checkpoints on the Hub are, with a pooler; returns the folder."""
    hf.ViTModel(models.tiny("vit").config).save_pretrained(folder)
    hf.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def colours(folder: Path, count: int = 24) -> Path:
    """A folder with images of one colour each, all different."""
    draw = random.Random(0)
    folder.mkdir()
    for number in range(count):
        colour = tuple(draw.randrange(256) for _ in range(3))
        Image.new("RGB", (16, 16), colour).save(folder / f"{number}.png")
    return folder
