"""Image embeddings without labels: two random views of an image must be closer than views of different images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.finetune.contrast import (
    CHUNK,
    in_chunks,
    require_batch,
    two_sided_loss,
    unused_pooler,
)
from peftkit.finetune.images import open_image, require_pillow, shown, stored_image
from peftkit.finetune.schema import key
from peftkit.finetune.tasks.base import Encoded, Setting, Task

if TYPE_CHECKING:
    import torch


@dataclass
class Options:
    """Options of ``contrastive_images``."""

    temperature: float = key(0.1, "Similarities are divided by this number", above=0)
    least_crop: float = key(0.2, "Smallest share of an image that a view shows", above=0)
    jitter: float = key(
        0.4, "Largest change of contrast, colour and brightness, as a share", least=0, below=1
    )
    chunk: int | None = key(None, CHUNK, least=1)


class ContrastiveImages(Task):
    """Images without labels. A view is a random part of an image, perhaps mirrored, with other colours.

    There is no projection head: the mean of the last layer's outputs is compared.

    Source: Chen et al., 2020, arXiv:2002.05709 (SimCLR).
    """

    name = "contrastive_images"
    summary = "images without labels; two random views of each, against those of the other images"
    auto_class = "AutoModel"
    columns: ClassVar[dict[str, str]] = {"image": "path of the image, or an image of a data set"}
    Options = Options
    processor = "image"
    has_own_loss = True
    epochs = 10.0

    def __init__(self, setting: Setting):
        super().__init__(setting)
        require_pillow()

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        return [Encoded({"image": stored_image(row.get("image"))}, 1, 1)]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Two views of each image: ``Float32[2 · rows, channels, height, width]``, the first views before the second."""
        import torch

        images = [open_image(row["image"]) for row in rows]
        pixels = self.setting.tokenizer(images, return_tensors="pt")["pixel_values"]
        # The names of the files without their place, so that moved data give the same views.
        draws = self.draws([{"image": Path(row["image"]).parts[-2:]} for row in rows])
        views = [self._view(image, draws) for _ in range(2) for image in pixels]
        return {"pixel_values": torch.stack(views), "labels": torch.arange(len(rows))}

    def _view(self, image: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
        """A random view of the same size."""
        import torch

        options = self.setting.options
        height, width = image.shape[-2:]
        share, shape, down, right, mirror = torch.rand(5, generator=draws).tolist()
        area = min(options.least_crop, 1.0) + share * (1 - min(options.least_crop, 1.0))
        ratio = math.exp((2 * shape - 1) * math.log(4 / 3))
        tall = max(1, min(height, round(height * math.sqrt(area * ratio))))
        wide = max(1, min(width, round(width * math.sqrt(area / ratio))))
        top, left = int(down * (height - tall + 1)), int(right * (width - wide + 1))
        part = image[:, top : top + tall, left : left + wide]
        part = torch.nn.functional.interpolate(
            part[None], (height, width), mode="bilinear", align_corners=False, antialias=True
        )[0]
        if mirror < 0.5:
            part = part.flip(-1)
        gain = 1 + options.jitter * (2 * torch.rand(len(part), 1, 1, generator=draws) - 1)
        return part * gain + options.jitter * (2 * torch.rand(1, generator=draws) - 1)

    def render(self, features: dict[str, Any]) -> str:
        return f"«{shown(features['image'])}»"

    def outside_loss(self, model: Any, rows: list[dict[str, Any]]) -> list[str]:
        return unused_pooler(model)

    def check_model(self, model: Any, rows: list[dict[str, Any]]) -> None:
        require_batch(rows, self.name)

    def loss(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
        def encode(part: dict[str, Any]) -> Any:
            states = model(**part).last_hidden_state.float()
            # Transformers: [rows, patches, width]; convolutions: [rows, width, height, width of the map].
            return states.mean(1) if states.ndim == 3 else states.flatten(2).mean(2)

        options = self.setting.options
        batch = {"pixel_values": inputs["pixel_values"]}
        loss, scores = two_sided_loss(in_chunks(encode, batch, options.chunk), options.temperature)
        return loss, {"loss": loss, "logits": scores}


TASK = ContrastiveImages
