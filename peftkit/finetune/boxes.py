"""Objects in rows: classes with boxes, which become corners in pixels and are checked against their image."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from peftkit.errors import short
from peftkit.finetune.tasks.base import BadRow

BoxFormat = Literal["xywh", "xyxy", "cxcywh-normalised"]
"""Left, top, width and height in pixels, as COCO has them; corners in pixels; or centre, width and height as shares of the image."""

_LABELS = ("label", "category")
_OUTSIDE = 1.0
"""Pixels by which a box may stick out of its image. Annotation tools round; such a box is cut at the edge."""


class Entry(NamedTuple):
    """One object as it is written in a row.

    Attributes:
        where: Its place, for messages.
        box: Four numbers, unchecked.
        label: Its class, unchecked.
        crowd: Whether the box is around many objects that are not told apart (COCO's ``iscrowd``).
    """

    where: str
    box: Any
    label: Any
    crowd: bool


def entries_of(value: Any) -> list[Entry]:
    """The objects of a row.

    Args:
        value: A list of mappings with ``bbox`` and ``label`` (or ``category``), or one mapping from these names to lists, as
            ``datasets`` stores such a list. Other keys are ignored, except ``iscrowd``.

    Raises:
        BadRow: It is something else, or a key is missing.
    """
    if isinstance(value, dict):
        value = _by_object(value)
    if not isinstance(value, (list, tuple)):
        raise BadRow(
            f"column 'objects' is {short(value)}; it must be a list of {{bbox: ..., label: ...}}, which is empty if the image has no object"
        )
    found = []
    for number, one in enumerate(value, start=1):
        where = f"object {number}"
        if not isinstance(one, dict):
            raise BadRow(f"{where} is {short(one)}; it must have the keys bbox and label")
        names = [name for name in _LABELS if name in one]
        if "bbox" not in one or len(names) != 1:
            raise BadRow(
                f"{where} has the keys {', '.join(map(str, one)) or 'none'}; it must have bbox and one of {', '.join(_LABELS)}"
            )
        crowd = one.get("iscrowd") or 0
        if crowd not in (0, 1):
            raise BadRow(f"{where}: iscrowd={short(crowd)} must be 0 or 1")
        found.append(Entry(where, one["bbox"], one[names[0]], bool(crowd)))
    return found


def _by_object(lists: dict[str, Any]) -> list[dict[str, Any]]:
    """One mapping for each object, from lists by key."""
    own = {name: lists[name] for name in ("bbox", "iscrowd", *_LABELS) if name in lists}
    wrong = [name for name, values in own.items() if not isinstance(values, (list, tuple))]
    if wrong or "bbox" not in own or not any(name in own for name in _LABELS):
        raise BadRow(
            f"column 'objects' is a mapping with the keys {', '.join(map(str, lists)) or 'none'}; it must have lists by the keys bbox and "
            f"one of {', '.join(_LABELS)}"
        )
    lengths = {name: len(values) for name, values in own.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{number} of {name}" for name, number in lengths.items())
        raise BadRow(f"column 'objects' has lists of different lengths: {counts}")
    return [dict(zip(own, values, strict=True)) for values in zip(*own.values(), strict=True)]


def corners_of(entry: Entry, box_format: BoxFormat, size: tuple[int, int]) -> list[float]:
    """Left, top, right and bottom of a box in pixels.

    Args:
        entry: The object.
        box_format: What the numbers of its box are.
        size: Width and height of the image in pixels.

    Raises:
        BadRow: The box is not made of four finite numbers, has no area, or is outside the image.
    """
    where = f"{entry.where}: bbox={short(entry.box)}"
    values = entry.box
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, (list, tuple)) or len(values) != 4:
        raise BadRow(f"{where} must have four numbers")
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in values):
        raise BadRow(f"{where} must have four numbers")
    a, b, c, d = (float(value) for value in values)
    if not all(map(math.isfinite, (a, b, c, d))):
        raise BadRow(f"{where} has a number that is not finite")
    width, height = size
    if box_format == "xyxy":
        left, top, right, bottom = a, b, c, d
    elif box_format == "xywh":
        left, top, right, bottom = a, b, a + c, b + d
    else:
        left, right = (a - c / 2) * width, (a + c / 2) * width
        top, bottom = (b - d / 2) * height, (b + d / 2) * height
    if right <= left or bottom <= top:
        raise BadRow(f"{where} has no area, read as {box_format}; correct it, or task.box_format")
    if box_format != "cxcywh-normalised" and max(a, b, c, d) <= 1 and max(width, height) > 1:
        raise BadRow(
            f"{where} has no number above 1, but task.box_format={box_format} has pixels; if these are shares of the image, set "
            "task.box_format to cxcywh-normalised"
        )
    outside = max(-left, -top, right - width, bottom - height)
    if outside > _OUTSIDE:
        raise BadRow(
            f"{where} is outside the image of {width} x {height} pixels by {outside:.4g}, read as {box_format}; correct it, or "
            "task.box_format"
        )
    cut = [max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height)]
    if cut[2] <= cut[0] or cut[3] <= cut[1]:
        raise BadRow(f"{where} is outside the image of {width} x {height} pixels")
    return [float(value) for value in cut]
