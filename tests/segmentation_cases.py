"""A tiny SegFormer with its image processor, and images whose halves have two of three colours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from task_models import BUILDERS
from vision_chat_cases import COLOURS

SIZE = 32


def tiny() -> Any:
    """A tiny SegFormer for three classes, with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BUILDERS["segformer segments"][0]().train()


def save(folder: Path, name: str = "segformer") -> Path:
    """Save the tiny model; its head is loaded too, unless the name is ``"backbone"``."""
    model = tiny()
    (model.base_model if name == "backbone" else model).save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    hf.SegformerImageProcessorPil(size=size, do_reduce_labels=True).save_pretrained(folder)
    return folder


def halves(folder: Path, count: int = 6) -> list[dict[str, Any]]:
    """Images of two colours with masks. Class i is the i-th colour; the left edge is 255."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = list(COLOURS.values())
    rows = []
    for number in range(count):
        mask = np.full((SIZE, SIZE), number % 3, dtype=np.uint8)
        mask[:, SIZE // 2 :] = (number + 1 + number % 2) % 3
        pixels = np.array(colours, dtype=np.uint8)[mask]
        mask[:, 0] = 255
        row = {name: str(folder / f"{number}.{name}.png") for name in ("image", "mask")}
        Image.fromarray(pixels).save(row["image"])
        Image.fromarray(mask).save(row["mask"])
        rows.append(row)
    return rows
