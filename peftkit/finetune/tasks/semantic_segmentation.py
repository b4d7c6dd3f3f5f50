"""One class for each pixel of an image."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from peftkit.errors import ContractError, short
from peftkit.finetune.images import open_image, require_pillow, shown, size_of, stored_image
from peftkit.finetune.processes import mean_of_all, own_rows_in_last_batch, process_count
from peftkit.finetune.schema import key
from peftkit.finetune.tasks.base import BadRow, Encoded, Setting, Task

if TYPE_CHECKING:
    import torch

_MOST = 255
"""Masks have eight bits, and one value is that of ignored pixels."""


@dataclass
class Options:
    """Options of ``semantic_segmentation``."""

    classes: list[str] = key(
        [], "Names of the classes in the order of their numbers. []: the numbers in the masks"
    )
    ignore_index: int | None = key(
        255, "Pixels with this number take no part in loss and metrics. null: there are none"
    )


class SemanticSegmentation(Task):
    """Images with a mask of the same size, which has the number of a class for each pixel."""

    name = "semantic_segmentation"
    summary = "images with masks that have the number of a class for each pixel"
    auto_class = "AutoModelForSemanticSegmentation"
    columns: ClassVar[dict[str, str]] = {
        "image": "path of the image, or an image of a data set",
        "mask": "path of an image with one channel of class numbers, an image, or an array",
    }
    Options = Options
    metric_names = ("mean_iou", "pixel_accuracy")
    best_metric = "mean_iou"
    processor = "image"
    example_model = "nvidia/mit-b0"
    has_own_loss = True
    has_own_counts = True
    smooths_labels = False

    def __init__(self, setting: Setting):
        super().__init__(setting)
        require_pillow()
        if "segmentation_maps" not in inspect.signature(setting.tokenizer.preprocess).parameters:
            raise ContractError(
                f"task={self.name}: {type(setting.tokenizer).__name__} does not resize masks with their images; use a model such as "
                "SegFormer, BEiT, DPT or UPerNet"
            )

    @classmethod
    def known_labels(cls, options: Any) -> list[str]:
        if options.classes and not 2 <= len(options.classes) <= _MOST:
            raise ContractError(
                f"task.classes has {len(options.classes)} names; give 2 to {_MOST}, or [] for the numbers in the masks"
            )
        return list(options.classes)

    @classmethod
    def labels_of(cls, row: dict[str, Any]) -> set[str]:
        return {str(number) for number in np.unique(_numbers(_stored_mask(row.get("mask"))))}

    @classmethod
    def find_labels(cls, names: set[str], options: Any) -> list[str]:
        found = {int(name) for name in names} - {options.ignore_index}
        if len(found) < 2:
            raise ContractError(
                f"the masks have {len(found)} different classes ({', '.join(map(str, sorted(found))) or 'none'}), but at least 2 are needed; "
                "check data.columns.mask and task.ignore_index"
            )
        return [str(number) for number in range(max(found) + 1)]

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        image, mask = stored_image(row.get("image")), _stored_mask(row.get("mask"))
        numbers = _numbers(mask)
        if numbers.shape[::-1] != size_of(image):
            width, height = size_of(image)
            raise BadRow(
                f"the mask has {numbers.shape[1]} x {numbers.shape[0]} pixels, but the image has {width} x {height}"
            )
        used = numbers[numbers != self._ignored]
        if used.size and used.max() >= len(self.setting.labels):
            raise BadRow(
                f"the mask has the number {used.max()}, but the classes are 0 to {len(self.setting.labels) - 1}; correct the mask, "
                "task.classes or task.ignore_index"
            )
        return [Encoded({"image": image, "mask": mask}, 1, int(used.size))]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Pixels ``Float32[rows, 3, height, width]`` and class numbers ``Int64[rows, height, width]``."""
        images = [open_image(row["image"]) for row in rows]
        masks = []
        for row in rows:
            numbers = _numbers(row["mask"])
            masks.append(np.where(numbers == self._ignored, self._model_ignores, numbers))
        options: dict[str, Any] = {"return_tensors": "pt"}
        if hasattr(self.setting.tokenizer, "do_reduce_labels"):
            # The numbers mean what the user says, also with a processor of a data set in which 0 is the background.
            options["do_reduce_labels"] = False
        found = self.setting.tokenizer(
            images, segmentation_maps=[mask.astype(np.uint8) for mask in masks], **options
        )
        return {"pixel_values": found["pixel_values"], "labels": found["labels"].long()}

    def render(self, features: dict[str, Any]) -> str:
        numbers = _numbers(features["mask"])
        kinds, counts = np.unique(numbers[numbers != self._ignored], return_counts=True)
        shares = ", ".join(
            f"{self.setting.labels[kind]} {share:.0%}"
            for kind, share in zip(kinds, counts / numbers.size, strict=True)
        )
        return f"{shown(features['image'])} -> «{shares}»"

    def check_model(self, model: Any, rows: list[dict[str, Any]]) -> None:
        if self._model_ignores < len(self.setting.labels):
            raise ContractError(
                f"{type(model).__name__} ignores pixels of class {self._model_ignores}, but there are {len(self.setting.labels)} classes; set "
                "the ignore_index of the model's config to 255"
            )

    def loss(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
        labels = inputs["labels"]
        own = own_rows_in_last_batch(len(labels))
        if own is not None:
            labels = labels.clone()
            labels[own:] = self._model_ignores
        out = model(**{**inputs, "labels": labels})
        items = (labels != self._model_ignores).sum()
        # The mean over no pixel is NaN, but others of the batch may be in another process.
        nothing = process_count() > 1 and not bool(items)
        loss = mean_of_all(out.logits.sum() * 0.0 if nothing else out.loss, items)
        return loss, {"loss": loss, "logits": out.logits}

    def counted(self, inputs: dict[str, Any], outputs: Any) -> tuple[Any, Any]:
        """For each row and class the pixels that are right, found and wanted: ``Int64[rows, classes, 3]``."""
        import torch

        labels = inputs["labels"]
        logits = torch.nn.functional.interpolate(
            outputs["logits"].float(), labels.shape[-2:], mode="bilinear", align_corners=False
        )
        found = logits.argmax(1)
        used = labels != self._model_ignores
        classes = len(self.setting.labels)
        counts = [
            torch.stack([(found == labels) & used & (labels == c) for c in range(classes)], 1),
            torch.stack([(found == c) & used for c in range(classes)], 1),
            torch.stack([(labels == c) & used for c in range(classes)], 1),
        ]
        return torch.stack([part.flatten(2).sum(2) for part in counts], 2), labels.new_zeros(
            len(labels)
        )

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        return segmentation_scores(np.asarray(predictions).sum(0))

    @property
    def _ignored(self) -> int:
        """The number of ignored pixels in the rows; -1 if there are none."""
        ignored = self.setting.options.ignore_index
        return -1 if ignored is None else ignored

    @property
    def _model_ignores(self) -> int:
        """The number of the pixels that the model's loss leaves out."""
        for name in ("semantic_loss_ignore_index", "loss_ignore_index"):
            value = getattr(self.setting.config, name, None)
            if isinstance(value, int) and 0 <= value <= _MOST:
                return value
        return _MOST


def segmentation_scores(counts: Any) -> dict[str, float]:
    """The mean over the classes of intersection over union, and the share of the pixels that are right.

    Args:
        counts: ``Int64[classes, 3]``: pixels that are right, found and wanted. Classes that are neither found nor wanted are left out.
    """
    right, found, wanted = np.asarray(counts).T
    union = found + wanted - right
    present = union > 0
    return {
        "mean_iou": float(np.mean(right[present] / union[present])) if present.any() else 0.0,
        "pixel_accuracy": float(right.sum() / wanted.sum()) if wanted.sum() else 0.0,
    }


def _stored_mask(value: Any) -> str:
    """A mask as ``stored_image`` stores images; arrays become images."""
    if isinstance(value, (list, tuple, np.ndarray)):
        try:
            numbers = np.asarray(value)
        except ValueError as error:
            raise BadRow(f"column 'mask' is no array of rows of equal length ({error})") from error
        if numbers.ndim != 2 or numbers.dtype.kind not in "iub" or numbers.size == 0:
            raise BadRow(
                f"column 'mask' is an array with {numbers.ndim} axes of type {numbers.dtype}; it must have 2 axes of whole numbers"
            )
        if numbers.min() < 0 or numbers.max() > _MOST:
            raise BadRow(
                f"column 'mask' has numbers from {numbers.min()} to {numbers.max()}; they must be 0 to {_MOST}"
            )
        value = require_pillow().fromarray(numbers.astype(np.uint8))
    return stored_image(value, "mask")


def _numbers(stored: str) -> Any:
    """The numbers of the classes: ``Int64[height, width]``."""
    image = open_image(stored, None)
    if image.mode not in ("L", "P", "1", "I", "I;16"):
        raise BadRow(
            f"the mask {short(stored)} has the channels {image.mode}; it must have one channel with the numbers of the classes"
        )
    numbers = np.asarray(image).astype(np.int64)
    if numbers.max(initial=0) > _MOST:
        raise BadRow(
            f"the mask {short(stored)} has the number {numbers.max()}; numbers must be 0 to {_MOST}"
        )
    return numbers


TASK = SemanticSegmentation
