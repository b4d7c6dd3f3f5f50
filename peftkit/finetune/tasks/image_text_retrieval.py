"""Images and texts that belong together, for CLIP, SigLIP and their relatives."""

from __future__ import annotations

import hashlib
import inspect
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.errors import ContractError
from peftkit.finetune.contrast import pairs_of_all, require_batch
from peftkit.finetune.images import open_image, require_pillow, shown, stored_image
from peftkit.finetune.processes import process_count
from peftkit.finetune.reached import modules_outside_loss
from peftkit.finetune.retrieval import recalls
from peftkit.finetune.tasks.base import Encoded, Setting, Task, pad, text_of

if TYPE_CHECKING:
    import torch


class ImageTextRetrieval(Task):
    """Pairs of an image and a text. The loss is the model's own: CLIP's over the batch, or SigLIP's of each pair in it.

    Source: Radford et al., 2021, arXiv:2103.00020; Zhai et al., 2023, arXiv:2303.15343.
    """

    name = "image_text_retrieval"
    summary = "images with texts that belong to them; the other rows of the batch are the negatives"
    auto_class = "AutoModel"
    columns: ClassVar[dict[str, str]] = {
        "image": "path of the image, or an image of a data set",
        "text": "a text about it",
    }
    metric_names = (
        "mean_recall",
        "image_to_text_recall_at_1",
        "image_to_text_recall_at_5",
        "text_to_image_recall_at_1",
        "text_to_image_recall_at_5",
    )
    best_metric = "mean_recall"
    has_own_loss = True
    smooths_labels = False
    seq_len = 77
    processor = "image and text"
    example_model = "openai/clip-vit-base-patch32"

    def __init__(self, setting: Setting):
        super().__init__(setting)
        require_pillow()

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        text, image = text_of(row, "text"), stored_image(row.get("image"))
        tokenizer, size = self.setting.tokenizer, self.setting.seq_len
        length = len(tokenizer(text).input_ids)
        ids = list(tokenizer(text, truncation=True, max_length=size).input_ids)
        features = {"image": image, "input_ids": ids, "labels": [_number(image), _number(text)]}
        return [Encoded(features, length, 1)]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Tokens ``Int64[rows, length]``, pixels, and as labels the numbers of image and text ``Int64[rows, 2]``."""
        import torch

        tokenizer = self.setting.tokenizer
        ids = [row["input_ids"] for row in rows]
        if _has_fixed_length(self.setting.config):
            batch = {"input_ids": pad(ids, tokenizer.pad_token_id, self.setting.seq_len)}
        else:
            batch = {
                "input_ids": pad(ids, tokenizer.pad_token_id, 1),
                "attention_mask": pad([[1] * len(one) for one in ids], 0, 1),
            }
        images = [open_image(row["image"]) for row in rows]
        batch |= self.setting.processor.image_processor(images, return_tensors="pt")
        return batch | {"labels": torch.tensor([row["labels"] for row in rows])}

    def render(self, features: dict[str, Any]) -> str:
        text = self.setting.tokenizer.decode(features["input_ids"])
        return f"«{shown(features['image'])}» ~ «{text}»"

    def outside_loss(self, model: Any, rows: list[dict[str, Any]]) -> list[str]:
        _require_two_towers(model)
        require_batch(rows, self.name)
        device = next(model.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in self.collate(rows[:2]).items()}
        return modules_outside_loss(model, _arguments(batch))

    def loss(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
        out = model(**_arguments(inputs))
        vectors = {name: out[name].float() for name in ("image_embeds", "text_embeds")}
        loss = out.loss if process_count() == 1 else _loss_of_all(model, out)
        return loss, {"loss": loss, **vectors}

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        images, texts = predictions
        found = recalls(images, texts, labels[:, 0], labels[:, 1])
        return {"mean_recall": sum(found.values()) / len(found), **found}


def _arguments(batch: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the model's forward: everything but the numbers that only the metrics need."""
    return {n: t for n, t in batch.items() if n != "labels"} | {"return_loss": True}


def _loss_of_all(model: Any, out: Any) -> torch.Tensor:
    """The model's loss of the rows of all processes, from its output for those of this process.

    Raises:
        ContractError: The model computes its scores or its loss in another way than CLIP and SigLIP.
    """
    import torch

    own: dict[str, Any] = {name.rsplit(".", 1)[-1]: p for name, p in model.named_parameters()}
    scale, bias = own.get("logit_scale"), own.get("logit_bias", 0.0)

    def scores(texts: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return texts @ images.T * scale.exp() + bias

    vectors = out["text_embeds"].float(), out["image_embeds"].float()
    compute = _siglip_loss if "logit_bias" in own else _clip_loss
    with torch.no_grad():
        given = out["logits_per_text"].float()
        known = (
            scale is not None
            and bool((scores(*vectors) - given).abs().max() <= 0.02 * given.abs().max())
            and bool((compute(given) - out.loss).abs() <= 0.02 * out.loss.abs() + 1e-3)
        )
    if not known:
        raise ContractError(
            f"task=image_text_retrieval: the loss of {type(model).__name__} is neither CLIP's nor SigLIP's, so it cannot be computed for "
            f"the rows of {process_count()} processes; start the run without torchrun"
        )
    return compute(scores(*pairs_of_all(torch.cat(vectors))))


def _clip_loss(scores: torch.Tensor) -> torch.Tensor:
    """Mean of the losses of two classifiers, one that finds the image of each text and one that finds its text."""
    import torch

    wanted = torch.arange(len(scores), device=scores.device)
    losses = [torch.nn.functional.cross_entropy(one, wanted) for one in (scores, scores.T)]
    return torch.stack(losses).mean()


def _siglip_loss(scores: torch.Tensor) -> torch.Tensor:
    """The log loss of deciding for each text and image whether they belong together, added up over images."""
    import torch

    signs = 2 * torch.eye(len(scores), device=scores.device) - 1
    return -torch.nn.functional.logsigmoid(signs * scores).sum(1).mean()


def _number(value: str) -> int:
    """A number that is equal for equal texts."""
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=7).digest(), "little")


def _has_fixed_length(config: Any) -> bool:
    """Whether the model was trained on texts that were all padded to one length, without a mask."""
    return getattr(config, "model_type", "").startswith("siglip")


def _require_two_towers(model: Any) -> None:
    parameters = inspect.signature(type(model).forward).parameters
    if not {"input_ids", "pixel_values", "return_loss"} <= parameters.keys():
        raise ContractError(
            f"task=image_text_retrieval needs a model that compares images with texts, and {type(model).__name__} is none; use CLIP or "
            "SigLIP"
        )


TASK = ImageTextRetrieval
