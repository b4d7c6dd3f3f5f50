"""What the tests of distillation share: teachers that are larger than the tiny models, and how often two models agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import finetune_cases as cases
import models
import torch
import transformers as hf


def save_teacher(folder: Path, vocab_size: int = models.VOCAB_SIZE, seed: int = 5) -> Path:
    """Save a Llama that is wider and deeper than the tiny one, with a tokenizer; its answers are not uniform."""
    changes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    config = models.tiny("llama").config.to_dict() | changes | {"head_dim": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**config | {"vocab_size": vocab_size}))
        model.lm_head.weight.data.normal_(std=0.3)
    model.save_pretrained(folder)
    cases.letter_tokenizer(chat=True).save_pretrained(folder)
    return folder


def save_deeper(folder: Path) -> Path:
    """Save a Llama as wide as the tiny one, with twice as many layers, with a tokenizer."""
    config = models.tiny("llama").config
    config.num_hidden_layers = 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        hf.LlamaForCausalLM(config).save_pretrained(folder)
    cases.letter_tokenizer(chat=True).save_pretrained(folder)
    return folder


def distilled(model: Path, teacher: Any, train: Any, out: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of ``sft`` with a teacher. ``changes`` are those of ``cases.recipe``; ``distill`` adds keys."""
    own = {"teacher": str(teacher), **changes.pop("distill", {})}
    task = changes.pop("task", "sft")
    return cases.recipe(model, task, train, out, distill=own, **changes)


def batch_of(rows: int = 3, length: int = 12, seed: int = 3) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded on the right; only some tokens are supervised."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(7, models.VOCAB_SIZE, (rows, length), generator=draw)
    mask = torch.arange(length)[None] < torch.tensor([length - 2 * i for i in range(rows)])[:, None]
    labels = ids.masked_fill(~mask, -100)
    labels[:, :3] = -100
    return {
        "input_ids": ids.masked_fill(~mask, 0),
        "attention_mask": mask.long(),
        "labels": labels,
    }


@torch.no_grad()
def agreement(student: Any, teacher: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    """Share of the supervised positions at which both models have the same most probable token."""
    same, total = 0, 0
    for batch in batches:
        inputs = {n: v for n, v in batch.items() if n != "labels"}
        used = batch["labels"][:, 1:] != -100
        one, other = (m.eval()(**inputs).logits[:, :-1].argmax(-1) for m in (student, teacher))
        same += int((one == other)[used].sum())
        total += int(used.sum())
    return same / total
