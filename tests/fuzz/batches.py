"""What a model is called with: lengths, padding, masks and labels as a case describes them."""

from typing import Any

import torch
from fuzz.build import Case, Unbuildable, dtype_of
from fuzz.plain import FAMILIES, WIDTH
from torch import Tensor

from peftkit.compatibility.batches import training_batch


def batch_of(case: Case, model: Any, number: int = 0) -> dict[str, Any]:
    """The arguments of one forward.

    Args:
        case: The case.
        model: Its base without adapters.
        number: Of the batch; each has other values.

    Raises:
        Unbuildable: No inputs for this model are known.
    """
    generator = torch.Generator().manual_seed((case["seed"] + 7919 * number) % 2**31)
    rows, length = case.get("rows", 2), case.get("length", 8)
    scale = case.get("scale", 1.0)
    if case["family"] in FAMILIES:
        x = torch.randn(rows, length, WIDTH, generator=generator) * scale
        x = x + 0.5 if "mean" in case.get("values", []) else x
        return {"input": x.to(dtype_of(case))}
    try:
        batch = training_batch(model)
    except Exception as error:  # whatever an architecture needs that is not known here
        raise Unbuildable(f"no batch: {error}") from error
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator) * scale
            batch[name] = drawn.to(dtype_of(case))
    ids = batch.get("input_ids")
    if ids is not None and set(batch) <= {"input_ids", "attention_mask", "labels"}:
        _text(case, model, batch, rows, length, generator)
    if case.get("labels") == "none":
        batch.pop("labels", None)
    return batch


def _text(
    case: Case,
    model: Any,
    batch: dict[str, Any],
    rows: int,
    length: int,
    generator: torch.Generator,
) -> None:
    """Replace the ids, mask and labels of a text batch, in place."""
    vocabulary = model.config.get_text_config().vocab_size
    classes = batch["labels"].dim() == 1 if "labels" in batch else False
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if case.get("padding") and rows > 1 and length > 2:
        hidden = slice(-2, None) if case["padding"] == "right" else slice(0, 2)
        mask[1, hidden] = 0
        ids = ids.masked_fill(mask == 0, 0)
    batch["input_ids"] = ids
    if "attention_mask" in batch:
        batch["attention_mask"] = mask
    if classes:
        batch["labels"] = torch.arange(rows) % model.config.num_labels
        return
    labels = ids.masked_fill(mask == 0, -100)
    ignored = case.get("ignored")
    if ignored == "all":
        labels.fill_(-100)
    elif ignored == "row":
        labels[0] = -100
    elif ignored == "start":
        labels[:, : length // 2] = -100
    if "labels" in batch:
        batch["labels"] = labels
    decoder = not getattr(model.config, "is_encoder_decoder", False)
    if "num_items" in case:
        batch["num_items_in_batch"] = torch.tensor(case["num_items"])
    if case.get("labels") == "shifted" and decoder:
        batch["shift_labels"] = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    if case.get("embeds") and decoder:
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).detach()
        batch["inputs_embeds"].requires_grad_(True)
    if case.get("mask") == "4d" and decoder:
        batch["attention_mask"] = _additive_mask(batch["attention_mask"], dtype_of(case))
    elif case.get("mask") == "none":
        batch.pop("attention_mask", None)


def _additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Causal and padding as ``[B, 1, T, T]``, added to the scores."""
    length = mask.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & mask[:, None, None, :].bool()
    seen = seen | torch.eye(length, dtype=torch.bool)  # no row without any key
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
