"""One class for an image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.errors import ContractError, short
from peftkit.finetune.tasks.base import (
    BadRow,
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
        "image": "path of the image",
        "label": "the name or number of the class",
    }
    metric_names = ("accuracy", "f1")
    best_metric = "accuracy"
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
        return [Encoded({"image": require_image(row), "labels": label}, 1, 1)]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        images = [open_image(row["image"]) for row in rows]
        found = self.setting.tokenizer(images, return_tensors="pt")
        labels = torch.tensor([row["labels"] for row in rows])
        return {"pixel_values": found["pixel_values"], "labels": labels}

    def render(self, features: dict[str, Any]) -> str:
        return f"{features['image']} -> «{self.setting.labels[features['labels']]}»"

    def keep_of_logits(self, logits: Any, labels: Any) -> Any:
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits.argmax(-1)

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        return {"accuracy": accuracy(predictions, labels), "f1": macro_f1(predictions, labels)}


def require_image(row: dict[str, Any]) -> str:
    """The path of a row's image.

    Raises:
        BadRow: There is no image that can be read.
    """
    image = row.get("image")
    if not isinstance(image, str) or not image:
        raise BadRow(f"column 'image' is {short(image)}, not the path of an image")
    if not Path(image).is_file():
        raise BadRow(f"the image {image} does not exist")
    try:
        with require_pillow().open(image) as opened:
            opened.verify()
    except (OSError, SyntaxError) as error:
        raise BadRow(f"{image} is no image that can be read ({error})") from error
    return image


def open_image(path: str) -> Any:
    """An image with three colours."""
    with require_pillow().open(path) as opened:
        return opened.convert("RGB")


def require_pillow() -> Any:
    """The module ``PIL.Image``; raises ``ContractError`` if pillow is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ContractError(
            "tasks with images need the package pillow: pip install 'peftkit[vision]'"
        ) from error
    return Image


TASK = ImageClassification
