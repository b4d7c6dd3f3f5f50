"""Read a GGUF file back with transformers, and compare the logits with those of the model that was exported."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.export.families import require_gguf, window_of
from peftkit.export.metadata import completed_config
from peftkit.export.tensors import plain_frequencies
from peftkit.find.points import evaluating

_TEXT = (
    "The quick brown fox jumps over 13 lazy dogs; then it sleeps. In 1969, people walked on the Moon, and the code said:\n"
    "def area(radius):\n    return 3.14159 * radius ** 2  # in m\u00b2\n\u00dcber Caf\u00e9s spricht man gern: \u201cBonjour, \u4f60\u597d!\u201d"
)


def probe_ids(config: Any, tokenizer: Any) -> Tensor:
    """Token ids to compare logits on, ``Int64[1, tokens]``: a fixed text, or fixed random ids without a tokenizer."""
    if tokenizer:
        ids = tokenizer(_TEXT, return_tensors="pt")["input_ids"]
    else:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, config.vocab_size, (1, 96), generator=generator)
    return ids[:, : window_of(config) or config.max_position_embeddings]


def difference(expected: Tensor, found: Tensor) -> float:
    """The root mean square error of logits relative to their own deviation from each position's mean.

    Args:
        expected: ``[..., vocabulary]``.
        found: The same shape.
    """
    expected, found = expected.double().cpu(), found.double().cpu()
    spread = expected - expected.mean(-1, keepdim=True)
    return float((found - expected).pow(2).mean().sqrt() / spread.pow(2).mean().sqrt())


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits of a model in evaluation mode, in which it is only during the call."""
    with evaluating(model):
        device = model.get_input_embeddings().weight.device
        return model(input_ids=ids.to(device), use_cache=False).logits


def read_model(file: Path, dtype: torch.dtype) -> nn.Module:
    """Load a GGUF file with transformers, completed by what transformers does not read.

    Args:
        file: The file.
        dtype: The dtype to compute in.
    """
    import transformers

    with _quiet():
        config = transformers.AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
        reader = require_gguf().GGUFReader(file)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("tokenizer.")
        }
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        config = completed_config(config, fields, set(tensors))
        kind = transformers.AutoModelForCausalLM
        model = kind.from_pretrained(
            str(file.parent), gguf_file=file.name, config=config, dtype=dtype
        )
    if "rope_freqs.weight" in tensors:
        divisors = torch.tensor(tensors["rope_freqs.weight"].data.copy())
        rotary = model.model.rotary_emb
        rotary.inv_freq.copy_(plain_frequencies(config) / divisors)
        rotary.original_inv_freq = rotary.inv_freq
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' progress bars."""
    from transformers.utils.logging import (
        disable_progress_bar,
        enable_progress_bar,
        is_progress_bar_enabled,
    )

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        # transformers' reader of GGUF files has a bar that this setting does not hide
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            enable_progress_bar()
