"""One class for an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.finetune.images import open_image, require_pillow, shown, stored_image
from peftkit.finetune.tasks.base import (
    Encoded,
    Setting,
    Task,
    label_name,
    number_of_label,
    sorted_labels,
)
from peftkit.finetune.tasks.scores import accuracy, macro_f1

if TYPE_CHECKING:
    import torch


class ImageClassification(Task):
    """Images with a label: a folder with one folder for each class, or rows with the path of an image."""

    name = "image_classification"
    summary = "a folder with one folder of images for each class, or rows with a path and a label"
    auto_class = "AutoModelForImageClassification"
    columns: ClassVar[dict[str, str]] = {
        "image": "path of the image, or an image of a data set",
        "label": "the name or number of the class",
    }
    metric_names = ("accuracy", "f1")
    best_metric = "accuracy"
    distils = "same"
    processor = "image"

    def __init__(self, setting: Setting):
        super().__init__(setting)
        require_pillow()

    @classmethod
    def labels_of(cls, row: dict[str, Any]) -> set[str]:
        return {label_name(row["label"])} if row.get("label") not in (None, "") else set()

    @classmethod
    def find_labels(cls, names: set[str], options: Any) -> list[str]:
        return sorted_labels(names)

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        label = number_of_label(row.get("label"), self.setting.labels)
        image = stored_image(row.get("image"))
        return [Encoded({"image": image, "labels": label}, 1, 1)]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        images = [open_image(row["image"]) for row in rows]
        found = self.setting.tokenizer(images, return_tensors="pt")
        labels = torch.tensor([row["labels"] for row in rows])
        return {"pixel_values": found["pixel_values"], "labels": labels}

    def render(self, features: dict[str, Any]) -> str:
        return f"{shown(features['image'])} -> «{self.setting.labels[features['labels']]}»"

    def keep_of_logits(self, logits: Any, labels: Any) -> Any:
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits.argmax(-1)

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        return {"accuracy": accuracy(predictions, labels), "f1": macro_f1(predictions, labels)}


TASK = ImageClassification
