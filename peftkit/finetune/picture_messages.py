"""Conversations with images: rows become messages whose contents are lists of parts, and the images in their order."""

from __future__ import annotations

import json
from typing import Any

from peftkit.errors import count, short
from peftkit.finetune.images import stored_image
from peftkit.finetune.tasks.base import BadRow, text_of
from peftkit.finetune.tasks.sft import ROLES

_SOURCES = ("image", "path", "url", "image_url", "data")
"""Keys under which a part of a message may have its image."""

Message = dict[str, Any]


def conversation_with_images(
    row: dict[str, Any], system: str | None, *, answered: bool = True
) -> tuple[list[Message], list[str]]:
    """The messages of a row and its images.

    Contents are lists of ``{"type": "image"}`` and ``{"type": "text", "text": ...}``. Images of the column ``images`` or ``image`` take the
    places of parts without an image of their own, or stand before the first text of the user if there is no such part.

    Args:
        row: Columns ``messages``, or ``prompt`` and ``completion``; ``image`` or ``images``; ``system``.
        system: System message of rows without one.
        answered: Whether an answer is required.

    Raises:
        BadRow: Something is missing or of another type, an image cannot be read, or the numbers of images and places differ.
    """
    messages = _messages(row, answered)
    own_system = text_of(row, "system", optional=True) or system
    if own_system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": [_text(own_system)]})
    given = _given(row)
    places = [
        part for message in messages for part in message["content"] if part["type"] == "image"
    ]
    if given and not places:
        first = next((m for m in messages if m["role"] == "user"), None)
        if first is None:
            raise BadRow("no message has the role 'user', so there is no place for the image")
        places = [{"type": "image", "image": None} for _ in given]
        first["content"] = [*places, *first["content"]]
    own = [place.pop("image") for place in places]
    if own.count(None) != len(given):
        raise BadRow(
            f"the messages have {count(own.count(None), 'place')} for images without one of their own, but column 'images' has {len(given)}"
        )
    if not own:
        raise BadRow("no image (column 'images', or a part of a message); use task=sft for texts")
    rest = iter(given)
    images = [next(rest) if image is None else image for image in own]
    stored = [stored_image(image, f"image {n}") for n, image in enumerate(images, start=1)]
    return messages, stored


def _given(row: dict[str, Any]) -> list[Any]:
    given = row.get("images") if row.get("images") is not None else row.get("image")
    if given is None or given == "":
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _messages(row: dict[str, Any], answered: bool) -> list[Message]:
    """The messages. Their images are still in the parts, or ``None``."""
    if row.get("messages") is None:
        if "prompt" not in row:
            raise BadRow(
                f"neither column 'messages' nor 'prompt' and 'completion' (the row has {', '.join(map(repr, row)) or 'none'})"
            )
        messages = [{"role": "user", "content": [_text(text_of(row, "prompt"))]}]
        if answered:
            answer = _text(text_of(row, "completion"))
            messages.append({"role": "assistant", "content": [answer]})
        return messages
    given = row["messages"]
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            raise BadRow(f"column 'messages' is text, but no JSON list: {short(given)}") from None
    if not isinstance(given, (list, tuple)) or not given:
        raise BadRow(f"column 'messages' is {short(given)}; it must be a list of messages")
    messages = [_message(one, number) for number, one in enumerate(given, start=1)]
    if answered and not any(message["role"] == "assistant" for message in messages):
        raise BadRow("no message has the role 'assistant', so there is no answer to learn")
    return messages


def _message(given: Any, number: int) -> Message:
    if not isinstance(given, dict):
        raise BadRow(f"message {number} is {short(given)}; it must have role and content")
    role, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
    if not isinstance(role, str) or not role:
        raise BadRow(
            f"message {number} has no role (it has {', '.join(map(repr, given)) or 'no keys'})"
        )
    role = ROLES.get(role, role)
    parts = content if isinstance(content, (list, tuple)) else [{"type": "text", "text": content}]
    found = [_part(part, number) for part in parts]
    texts = [part["text"] for part in found if part["type"] == "text"]
    if role == "assistant" and not "".join(texts).strip():
        raise BadRow(f"message {number} is an empty answer")
    if not found:
        raise BadRow(f"message {number} has no content")
    return {"role": role, "content": found}


def _part(given: Any, number: int) -> dict[str, Any]:
    if isinstance(given, str):
        return _text(given)
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        text = given.get("text")
        if not isinstance(text, str):
            raise BadRow(f"message {number} has the content {short(text)}, which is not text")
        return _text(text)
    if kind in ("image", "image_url"):
        # Tables fill the keys that other parts have with None.
        image = next((given[n] for n in _SOURCES if given.get(n) is not None), None)
        if isinstance(image, dict) and "url" in image:
            image = image["url"]
        return {"type": "image", "image": image}
    raise BadRow(
        f"message {number} has the part {short(given)}; parts have the type 'text' or 'image'"
    )


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
