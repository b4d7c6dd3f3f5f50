"""Mean average precision of boxes as COCO defines it, computed by COCO's own code."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from peftkit.errors import ContractError


def require_pycocotools() -> None:
    """Raise ``ContractError`` if pycocotools is not installed."""
    try:
        import pycocotools  # noqa: F401
    except ImportError as error:
        raise ContractError(
            "object_detection needs the package pycocotools for its metrics: pip install 'peftkit[detection]'"
        ) from error


def mean_average_precision(
    wanted: Sequence[Sequence[Sequence[float]]], found: Any, classes: int
) -> dict[str, float]:
    """COCO's AP over all classes, sizes of objects and 100 boxes for each class and image.

    Args:
        wanted: For each image its objects: class, crowd (1 or 0), left, top, right, bottom in pixels. Boxes that match a crowd count
            neither as right nor as wrong.
        found: ``Float[images, boxes, 6]``: score, class, left, top, right, bottom. Boxes with a negative score are padding.
        classes: Number of the classes. Classes without an object in these images are left out of the mean.

    Returns:
        ``map``: the mean of AP at IoU thresholds 0.5, 0.55, ..., 0.95; ``map_50``: AP at 0.5.

    Raises:
        ContractError: No image has an object, so that there is no class to average over, or a number is not finite.

    Source: Lin et al., 2014, arXiv:1405.0312; https://cocodataset.org/#detection-eval.
    """
    found = np.asarray(found, dtype=np.float64)
    if not np.isfinite(found).all():
        raise ContractError(
            "the model's boxes or scores are not finite in the evaluation; use a smaller training.lr or training.precision=fp32"
        )
    if not any(not crowd for objects in wanted for _, crowd, *_ in objects):
        raise ContractError(
            "the evaluation rows have no object, so there is no average precision; add rows with objects to data.eval"
        )
    truth = [
        (image, number, crowd, box, None)
        for image, objects in enumerate(wanted, start=1)
        for number, crowd, *box in objects
    ]
    guesses = [
        (image, row[1], 0, row[2:].tolist(), float(row[0]))
        for image, rows in enumerate(found, start=1)
        for row in rows
        if row[0] >= 0
    ]
    # pycocotools prints what it does.
    with contextlib.redirect_stdout(io.StringIO()):
        precision = _evaluated(truth, guesses, len(wanted), classes)
    return {"map": _mean(precision), "map_50": _mean(precision[0])}


def _evaluated(truth: list[Any], guesses: list[Any], images: int, classes: int) -> Any:
    """Precision by threshold of IoU, recall and class; -1 for classes without an object: ``Float64[10, 101, classes]``."""
    from pycocotools.cocoeval import COCOeval

    evaluation = COCOeval(
        _dataset(truth, images, classes), _dataset(guesses, images, classes), "bbox"
    )
    evaluation.evaluate()
    evaluation.accumulate()
    # The first range of areas is all of them, the last number of boxes is 100.
    return evaluation.eval["precision"][:, :, :, 0, -1]


def _dataset(objects: list[Any], images: int, classes: int) -> Any:
    """A data set of pycocotools. Its numbers start at 1: it takes an object with the number 0 for one that was not matched."""
    from pycocotools.coco import COCO

    annotations = []
    for number, (image, label, crowd, (left, top, right, bottom), score) in enumerate(objects, 1):
        width, height = right - left, bottom - top
        one = {
            "id": number,
            "image_id": image,
            "category_id": int(label) + 1,
            "iscrowd": int(crowd),
            "bbox": [left, top, width, height],
            "area": width * height,
        }
        annotations.append(one if score is None else one | {"score": score})
    made: Any = COCO()
    made.dataset = {
        "images": [{"id": number} for number in range(1, images + 1)],
        "categories": [{"id": number} for number in range(1, classes + 1)],
        "annotations": annotations,
    }
    made.createIndex()
    return made


def _mean(precision: Any) -> float:
    return float(precision[precision > -1].mean())
