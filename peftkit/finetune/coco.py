"""Annotation files of COCO: one JSON object with images, annotations and categories."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class CocoObjects(list):
    """Objects of an image, whose boxes are left, top, width and height in pixels."""


def is_coco(found: Any) -> bool:
    """Whether the content of a JSON file is that of an annotation file."""
    keys = ("images", "annotations", "categories")
    return isinstance(found, dict) and all(isinstance(found.get(key), list) for key in keys)


def coco_rows(
    found: dict[str, Any], folder: Path
) -> Iterator[tuple[str, dict[str, Any] | None, str]]:
    """One row for each image, in the order of the file.

    Args:
        found: The content of the file.
        folder: The folder to which the names of the images are relative.

    Yields:
        The name of the image, the columns ``image`` and ``objects``, and an empty text; or, in place of the columns, ``None`` and what is
        wrong with the file.
    """
    names: dict[Any, str] = {}
    for category in found["categories"]:
        if not isinstance(category, dict) or {"id", "name"} - category.keys():
            yield "categories", None, f"category {category!r} has no id or no name"
            return
        names[category["id"]] = str(category["name"])
    objects: dict[Any, CocoObjects] = defaultdict(CocoObjects)
    unknown: dict[Any, str] = {}
    for number, one in enumerate(found["annotations"], start=1):
        if not isinstance(one, dict) or {"image_id", "category_id", "bbox"} - one.keys():
            yield f"annotation {number}", None, "no image_id, category_id or bbox"
            continue
        if one["category_id"] not in names:
            unknown[one["image_id"]] = (
                f"annotation {number} has category_id {one['category_id']!r}, which is not one of {', '.join(map(str, names))}"
            )
            continue
        objects[one["image_id"]].append(
            {
                "bbox": one["bbox"],
                "label": names[one["category_id"]],
                "iscrowd": one.get("iscrowd", 0),
            }
        )
    known = set()
    for number, image in enumerate(found["images"], start=1):
        if not isinstance(image, dict) or {"id", "file_name"} - image.keys():
            yield f"image {number}", None, "no id or no file_name"
            continue
        own, name = image["id"], str(image["file_name"])
        if own in known:
            yield name, None, f"the id {own!r} is that of an image before it"
            continue
        known.add(own)
        if own in unknown:
            yield name, None, unknown[own]
            continue
        yield name, {"image": str(folder / name), "objects": objects.get(own, CocoObjects())}, ""
    for own in objects.keys() - known:
        yield "annotations", None, f"image_id {own!r} is the id of no image"
