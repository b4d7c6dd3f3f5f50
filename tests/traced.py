"""Traces of wrapped and of merged models.

``python tests/traced.py FILE`` saves, for each family, the logits of ``CASES`` with ``torch.save``.
"""

import copy
import io
import sys
import warnings
from pathlib import Path

import models
import pairs
import torch
from torch import nn

from peftkit import accelerate


class Logits(nn.Module):
    """A model that takes tensors by position and returns its logits, as ``torch.jit.trace`` needs."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True))).logits


def wide_models() -> None:
    """Make heads of 32 features and 20 tokens, which the native attention needs."""
    models.SEQUENCE_LENGTH, models.HIDDEN_SIZE = 20, 128
    models._DECODER.update(hidden_size=128)


def inputs(name: str) -> dict[str, torch.Tensor]:
    """A batch without labels."""
    batch = models.batch(name)
    labels = batch.pop("labels")
    return batch | ({"decoder_input_ids": labels.clamp(0)} if name == "t5" else {})


def outputs_of(stock: nn.Module, model: nn.Module, batch: dict[str, torch.Tensor]) -> dict:
    """The logits of ``model`` before, in and after a trace, those of ``stock``, and the exact ones."""
    tensors = tuple(batch.values())
    exact = Logits(pairs.in_float64(stock), list(batch))
    doubles = tuple(t.double() if t.is_floating_point() else t for t in tensors)
    module = Logits(model, list(batch))
    before = module(*tensors)
    trace = torch.jit.trace(module, tensors, check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(trace, buffer)
    buffer.seek(0)
    twice = trace(*(torch.cat([t, t]) for t in tensors))
    copy.deepcopy(model)
    return {
        "exact": exact(*doubles),
        "stock": Logits(stock, list(batch))(*tensors),
        "before": before,
        "traced": trace(*tensors),
        "loaded": torch.jit.load(buffer)(*tensors),
        "traced on twice the batch": twice[: before.shape[0]],
        "after": module(*tensors),
    }


def main(file: Path) -> None:
    """Write the outputs of every family."""
    warnings.simplefilter(
        "ignore"
    )  # a trace warns about each Python number that it treats as a constant
    wide_models()
    torch.set_num_threads(1)
    found = {}
    with torch.no_grad():
        for name in models.NAMES:
            stock = pairs.stock(name).eval()
            model, batch = accelerate(copy.deepcopy(stock)), inputs(name)
            found[f"{name} wrapped"] = outputs_of(stock, model, batch)
            merged = copy.deepcopy(stock).merge_and_unload()
            found[f"{name} merged"] = outputs_of(merged, model.merge_and_unload(), batch)
    torch.save(found, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
