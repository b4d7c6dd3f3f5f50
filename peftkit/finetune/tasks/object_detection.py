"""Classes and boxes of the objects in an image."""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from peftkit.errors import ContractError, count
from peftkit.finetune.average_precision import mean_average_precision, require_pycocotools
from peftkit.finetune.boxes import BoxFormat, corners_of, entries_of
from peftkit.finetune.coco import CocoObjects
from peftkit.finetune.detection_loss import (
    counting_own_objects,
    loss_of_all,
    require_known_loss,
)
from peftkit.finetune.images import (
    open_image,
    require_pillow,
    require_upright,
    shown,
    size_of,
    stored_image,
)
from peftkit.finetune.processes import own_rows_in_last_batch, process_count
from peftkit.finetune.schema import key
from peftkit.finetune.tasks.base import BadRow, Encoded, Setting, Task, label_name


@dataclass
class Options:
    """Options of ``object_detection``."""

    box_format: BoxFormat = key(
        "xywh",
        "xywh (left, top, width, height) or xyxy (corners) in pixels, or cxcywh-normalised",
    )
    classes: list[str] = key(
        [], "Names of the classes in the order of their numbers. []: the labels of the rows"
    )


class ObjectDetection(Task):
    """Images with a list of objects, each with a class and a box. The images are not augmented."""

    name = "object_detection"
    summary = "images with the classes and boxes of their objects"
    auto_class = "AutoModelForObjectDetection"
    columns: ClassVar[dict[str, str]] = {
        "image": "path of the image, or an image of a data set",
        "objects": "a list of {bbox, label}, or lists by the keys bbox and label; [] for an image without objects",
    }
    Options = Options
    metric_names = ("map", "map_50")
    best_metric = "map"
    processor = "image"
    example_model = "hustvl/yolos-small"
    has_own_loss = True
    has_own_counts = True
    smooths_labels = False

    def __init__(self, setting: Setting):
        super().__init__(setting)
        require_pillow()
        require_pycocotools()
        if importlib.util.find_spec("scipy") is None:
            raise ContractError(
                "object_detection needs the package scipy, with which transformers assigns boxes to objects: pip install "
                "'peftkit[detection]'"
            )
        if not hasattr(setting.tokenizer, "post_process_object_detection"):
            raise ContractError(
                f"task={self.name}: {type(setting.tokenizer).__name__} makes no boxes; use a model such as DETR, Deformable DETR, RT-DETR "
                "or YOLOS"
            )
        self._follows_mask: bool | None = None

    @classmethod
    def known_labels(cls, options: Any) -> list[str]:
        twice = [name for name, times in Counter(options.classes).items() if times > 1]
        if twice:
            raise ContractError(f"task.classes has {twice[0]!r} twice; each name is one class")
        return list(options.classes)

    @classmethod
    def labels_of(cls, row: dict[str, Any]) -> set[str]:
        return {label_name(entry.label) for entry in entries_of(row.get("objects"))}

    @classmethod
    def find_labels(cls, names: set[str], options: Any) -> list[str]:
        if not names:
            raise ContractError(
                "the training rows have no object with a label, so there is no class to train; check data.columns.objects"
            )
        numbers = all(name.lstrip("-").isdigit() for name in names)
        return sorted(names, key=int) if numbers else sorted(names)

    def check_rows(self, rows: Any, name: str) -> None:
        if not any(any(not crowd for _, crowd, *_ in _objects(row)) for row in rows):
            raise ContractError(
                f"no row of {name} has an object; there is nothing to learn or to measure without one"
            )

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        image = stored_image(row.get("image"))
        require_upright(image)
        size = size_of(image)
        value = row.get("objects")
        box_format = "xywh" if isinstance(value, CocoObjects) else self.setting.options.box_format
        objects = [
            [
                self._number(entry.label, entry.where),
                int(entry.crowd),
                *corners_of(entry, box_format, size),
            ]
            for entry in entries_of(value)
        ]
        single = sum(not crowd for _, crowd, *_ in objects)
        most = self._most_objects()
        if most is not None and single > most:
            raise BadRow(
                f"the image has {single} objects, but the model finds at most {most}; split the image, or use a model with more queries"
            )
        # As text, because lists of lists that are all empty would have no type in the table of the rows.
        features = {"image": image, "objects": json.dumps(objects)}
        # An image without objects is supervised too: the model learns to find nothing there.
        return [Encoded(features, 1, max(single, 1))]

    def _number(self, label: Any, where: str) -> int:
        labels = self.setting.labels
        name = label_name(label)
        if name in labels:
            return labels.index(name)
        if self.setting.options.classes and isinstance(label, int) and 0 <= label < len(labels):
            return label
        raise BadRow(f"{where} has the label {name!r}, which is not one of {', '.join(labels)}")

    def _most_objects(self) -> int | None:
        """The number of boxes that the model makes of an image. The loss would leave further objects out."""
        for name in ("num_queries", "num_detection_tokens"):
            value = getattr(self.setting.config, name, None)
            if isinstance(value, int):
                return value
        return None

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Returns:
            ``pixel_values``: ``Float32[rows, 3, height, width]``; ``pixel_mask``: ``Int64[rows, height, width]``, 0 in the padding, if the
            processor pads; ``labels``: for each row ``class_labels`` ``Int64[objects]``, ``boxes`` ``Float32[objects, 4]`` (centre, width
            and height as shares of the image without its padding) and ``orig_size`` ``Int64[2]`` (height and width of the image).
        """
        import torch

        images = [open_image(row["image"]) for row in rows]
        found = self._processed(images)
        labels = []
        for image, row in zip(images, rows, strict=True):
            single = [one for one in _objects(row) if not one[1]]
            corners = torch.tensor([one[2:] for one in single], dtype=torch.float64).reshape(-1, 4)
            start, end = corners.split(2, 1)
            boxes = torch.cat([(start + end) / 2, end - start], 1)
            labels.append(
                {
                    "class_labels": torch.tensor([one[0] for one in single], dtype=torch.long),
                    "boxes": (boxes / torch.tensor([*image.size, *image.size])).float(),
                    "orig_size": torch.tensor(image.size[::-1]),
                }
            )
        batch = {"pixel_values": found["pixel_values"], "labels": labels}
        if "pixel_mask" in found:
            batch["pixel_mask"] = found["pixel_mask"].long()
        return batch

    def _processed(self, images: list[Any]) -> Any:
        processor = self.setting.tokenizer
        try:
            found = processor(images, return_tensors="pt")
        except ValueError as error:
            raise ContractError(
                f"{type(processor).__name__} makes no batch of images of {', '.join(sorted({f'{i.width} x {i.height}' for i in images}))} "
                f"pixels ({' '.join(str(error).split())[:200]}); set do_pad to true or a size with height and width in its "
                "preprocessor_config.json, or training.batch_size to 1"
            ) from error
        if getattr(processor, "do_pad", False) and "pixel_mask" not in found and len(images) > 1:
            raise ContractError(
                f"{type(processor).__name__} does not say which pixels are padding, so boxes have no certain place; use training.batch_size=1, "
                "or a newer version of transformers"
            )
        return found

    def render(self, features: dict[str, Any]) -> str:
        parts = [
            f"{self.setting.labels[number]}{' (crowd)' if crowd else ''} {' '.join(f'{v:.4g}' for v in corners)}"
            for number, crowd, *corners in _objects(features)
        ]
        return f"{shown(features['image'])} -> «{', '.join(parts) or 'no object'}»"

    def check_model(self, model: Any, rows: list[dict[str, Any]]) -> None:
        import torch

        half = {p.dtype for p in model.parameters()} & {torch.bfloat16, torch.float16}
        if half:
            raise ContractError(
                f"{type(model).__name__} has weights in {', '.join(sorted(map(str, half)))}, in which boxes are too coarse; set base=fp32, and "
                "training.precision=bf16 to multiply in 16 bits"
            )
        require_known_loss(_base_of(model))

    def loss(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
        device = inputs["pixel_values"].device
        shares = self._shares(model, inputs)
        labels = [
            {
                **{name: tensor.to(device) for name, tensor in one.items()},
                "boxes": one["boxes"].to(device) * share[[1, 0, 1, 0]],
            }
            for one, share in zip(inputs["labels"], shares, strict=True)
        ]
        pixels = {
            name: inputs[name]
            for name in ("pixel_values", "pixel_mask")
            if name in inputs and name in _parameters(model)
        }
        out = _outputs(model, pixels, labels)
        loss = out.loss
        if process_count() > 1:
            counted, rows = out, own_rows_in_last_batch(len(labels))
            if rows is not None:
                # Each process makes another forward, because parts of the model may be in other processes.
                labels = labels[: max(1, rows)]
                first = {name: tensor[: len(labels)] for name, tensor in pixels.items()}
                counted = _outputs(model, first, labels)
            objects = sum(len(one["class_labels"]) for one in labels)
            rows = len(labels) if rows is None else rows
            loss = loss_of_all(_base_of(model), counted, objects, rows)
        return loss, {
            "loss": loss,
            "logits": out.logits,
            "pred_boxes": out.pred_boxes,
            "shares": shares,
        }

    def _shares(self, model: Any, inputs: dict[str, Any]) -> Any:
        """The part of each input to which the model's boxes refer, divided by the image in it: ``Float32[rows, 2]``, height and width.

        Models that use the mask of the padding place boxes in the image, whatever its padding, as in DETR's own code. Others, such as
        YOLOS, place them in the padded image. transformers' processors assume the latter for all models, but scale what is found by the
        size of the image, as if there were no padding.
        """
        import torch

        pixels = inputs["pixel_values"]
        ones = torch.ones(len(pixels), 2, device=pixels.device)
        mask = inputs.get("pixel_mask")
        if mask is None:
            return ones
        if self._follows_mask is None:
            # In all processes with the first batch, whatever its padding, because parts of the model may be in other processes.
            self._follows_mask = _follows_mask(model, pixels)
        if self._follows_mask:
            return ones
        filled = mask.bool()
        sides = torch.stack([filled.any(2).sum(1), filled.any(1).sum(1)], 1)
        return sides / torch.tensor(pixels.shape[-2:], device=pixels.device)

    def counted(self, inputs: dict[str, Any], outputs: Any) -> tuple[Any, Any]:
        """The boxes that the model finds: ``Float32[rows, boxes, 6]``, with score, class, left, top, right and bottom in pixels."""
        import torch

        self._require_own_processor(outputs["logits"].shape[-1])
        sizes = torch.stack([one["orig_size"] for one in inputs["labels"]]).to(outputs["logits"])
        made = SimpleNamespace(
            logits=outputs["logits"].float(), pred_boxes=outputs["pred_boxes"].float()
        )
        found = self.setting.tokenizer.post_process_object_detection(
            made, threshold=-1.0, target_sizes=sizes.float() / outputs["shares"]
        )
        rows = torch.stack(
            [
                torch.cat([one["scores"][:, None], one["labels"][:, None], one["boxes"]], 1)
                for one in found
            ]
        )
        return rows, torch.zeros(len(rows), device=rows.device)

    def _require_own_processor(self, width: int) -> None:
        """Raise ``ContractError`` if the processor reads scores in another way than the model writes them.

        Models with a score for "no object" have one more than classes, and their processors leave the last score out.
        """
        import torch

        classes = len(self.setting.labels)
        wanted = torch.full((1, 2, width), -20.0)
        wanted[0, 0, classes - 1] = 20.0
        if width > classes:
            wanted[0, 1, classes] = 20.0
        made = SimpleNamespace(logits=wanted, pred_boxes=torch.full((1, 2, 4), 0.5))
        (found,) = self.setting.tokenizer.post_process_object_detection(
            made, threshold=0.5, target_sizes=torch.ones(1, 2)
        )
        if found["labels"].tolist() != [classes - 1]:
            raise ContractError(
                f"{type(self.setting.tokenizer).__name__} does not find the last of {classes} classes in {width} scores, so it belongs to "
                "another kind of model; use the image processor of the model's own kind"
            )

    def scores(self, rows: Any, predictions: Any, labels: Any) -> dict[str, float]:
        wanted = [_objects(row) for row in rows]
        if len(wanted) != len(predictions):
            raise RuntimeError(
                f"{len(predictions)} predictions for {count(len(wanted), 'row')} of the evaluation"
            )
        found = np.asarray(predictions)
        classes = len(self.setting.labels)
        if found[..., 1].max() >= classes:
            raise ContractError(
                f"{type(self.setting.tokenizer).__name__} finds the class number {int(found[..., 1].max())}, but there are {classes} "
                "classes; use the image processor of the model's own kind"
            )
        return mean_average_precision(wanted, found, classes)


def _objects(row: Any) -> list[list[float]]:
    """Class, crowd and corners of the objects of an encoded row."""
    return json.loads(row["objects"])


def _outputs(model: Any, pixels: dict[str, Any], labels: list[dict[str, Any]]) -> Any:
    """What the model makes of a batch, with the loss of its rows."""
    import torch

    try:
        with counting_own_objects():
            return model(**pixels, labels=labels)
    except ValueError as error:
        with torch.no_grad():
            boxes = model(**pixels).pred_boxes
        if bool(boxes.isfinite().all()):
            raise
        raise ContractError(
            "the model's boxes are not finite, so training stopped; use a smaller training.lr, more training.warmup, or "
            "training.precision=fp32"
        ) from error


def _base_of(model: Any) -> Any:
    """A model without its adapters and the wrapper of several processes."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _parameters(model: Any) -> set[str]:
    """The names of what a model takes."""
    return set(inspect.signature(_base_of(model).forward).parameters)


def _follows_mask(model: Any, pixels: Any) -> bool:
    """Whether what the model computes depends on which pixels are padding.

    All outputs are compared, in full precision: a new head may place every box in the same place.
    """
    import torch

    from peftkit.checks.reach import undisturbed

    if "pixel_mask" not in _parameters(model):
        return False
    model = getattr(model, "module", model)
    whole = torch.autocast(pixels.device.type, enabled=False)
    with undisturbed(model), torch.no_grad(), whole:
        model.eval()
        height, width = pixels.shape[-2:]
        whole_mask = pixels.new_ones(len(pixels), height, width, dtype=torch.long)
        half_mask = whole_mask.clone()
        half_mask[:, (height + 1) // 2 :, (width + 1) // 2 :] = 0
        known, unknown = (
            model(pixel_values=pixels, pixel_mask=one) for one in (half_mask, whole_mask)
        )
    return any(
        isinstance(tensor, torch.Tensor) and not torch.equal(tensor, unknown[name])
        for name, tensor in known.items()
    )


TASK = ObjectDetection
