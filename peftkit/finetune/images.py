"""Images in rows. An encoded row has the path of an image, or its bytes as text; the pixels are read when a batch is made."""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from typing import Any

from peftkit.errors import ContractError, short
from peftkit.finetune.tasks.base import BadRow

_DATA = "data:image/"
_ORIENTATION = 0x0112
"""The number of the orientation among the facts that EXIF has about an image."""


def require_pillow() -> Any:
    """The module ``PIL.Image``.

    Raises:
        ContractError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ContractError(
            "tasks with images need the package pillow: pip install 'peftkit[vision]'"
        ) from error
    return Image


def stored_image(value: Any, column: str = "image") -> str:
    """The path of an image, or its bytes as a ``data:`` URI, after reading the file once.

    Args:
        value: A path, a ``data:image/...;base64,`` URI, an image of Pillow, or the mapping ``{"bytes": ..., "path": ...}`` with which
            ``datasets`` stores images.
        column: Name of the column, for messages.

    Raises:
        BadRow: There is no image, or it cannot be read.
    """
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():
        value = value["bytes"] if value.get("bytes") else value.get("path")
    image: Any = value
    if isinstance(image, require_pillow().Image):
        found = io.BytesIO()
        image.save(found, format="PNG")
        value = found.getvalue()
    if isinstance(value, bytes):
        value = f"{_DATA}png;base64,{base64.b64encode(value).decode()}"
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str) or not value:
        raise BadRow(f"column {column!r} is {short(value)}, not the path of an image")
    name = short(value) if value.startswith(_DATA) else value
    if value.startswith(("http://", "https://")):
        raise BadRow(f"the image {value} is on the web; download it and give the path")
    if not value.startswith(_DATA) and not Path(value).is_file():
        raise BadRow(f"the image {value} does not exist")
    try:
        with _opened(value) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError) as error:
        raise BadRow(f"{name} is no image that can be read ({error})") from error
    return value


def open_image(stored: str, mode: str | None = "RGB") -> Any:
    """The image of Pillow.

    Args:
        stored: What ``stored_image`` returned.
        mode: Pillow's name of the colours; ``None`` keeps those of the file.
    """
    with _opened(stored) as image:
        image.load()
        return image.convert(mode) if mode is not None else image.copy()


def size_of(stored: str) -> tuple[int, int]:
    """Width and height in pixels, from the head of the file."""
    with _opened(stored) as image:
        return image.size


def require_upright(stored: str) -> None:
    """Raise ``BadRow`` if the file says that its pixels are turned or mirrored: places in it would have two meanings."""
    with _opened(stored) as image:
        orientation = image.getexif().get(_ORIENTATION, 1)
    if orientation != 1:
        raise BadRow(
            f"{shown(stored)} is stored turned or mirrored (EXIF orientation {orientation}), so it is not certain what boxes refer to; save "
            "it upright, such as with PIL.ImageOps.exif_transpose, with the boxes of the upright image"
        )


def shown(stored: str) -> str:
    """An image in a line of text."""
    return f"[image of {len(stored)} characters]" if stored.startswith(_DATA) else stored


def _opened(stored: str) -> Any:
    images = require_pillow()
    if not stored.startswith(_DATA):
        return images.open(stored)
    try:
        content = base64.b64decode(stored.partition(",")[2], validate=True)
    except binascii.Error as error:
        raise ValueError(f"no valid base64: {error}") from error
    return images.open(io.BytesIO(content))
