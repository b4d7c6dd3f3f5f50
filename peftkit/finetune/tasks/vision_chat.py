"""Supervised fine-tuning on conversations with images: the loss is on the answers only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftkit.errors import ContractError, short
from peftkit.finetune.generative import require_blind_to_last
from peftkit.finetune.images import open_image, require_pillow
from peftkit.finetune.picture_messages import conversation_with_images
from peftkit.finetune.reached import modules_outside_loss
from peftkit.finetune.schema import key
from peftkit.finetune.tasks.base import IGNORED, BadRow, Encoded, Setting, marked, pad
from peftkit.finetune.tasks.sft import Sft

if TYPE_CHECKING:
    import torch

_PLACEHOLDERS = ("image_token", "boi_token", "start_of_image_token")
"""Attributes of processors with the token that stands for an image in the text of a chat template."""


@dataclass
class Options:
    """Options of ``vision_chat``."""

    train_on: Literal["answers", "last_answer", "everything"] = key(
        "answers", "Which tokens the loss is computed on"
    )
    chat_template: str | None = key(
        None, "A file with a Jinja template, instead of the processor's own"
    )
    system: str | None = key(None, "System message of rows without one")


class VisionChat(Sft):
    """Answers of conversations about images.

    The processor turns each image into as many tokens as the model makes of it. Rows keep the text and the paths of the images, and a
    batch is made by the processor again, so that the pixels are not in memory all the time.
    """

    name = "vision_chat"
    summary = "conversations or prompts about images, with answers; loss on the answers"
    auto_class = "AutoModelForImageTextToText"
    columns: ClassVar[dict[str, str]] = {
        "messages": "a list of {role, content}; contents are texts, or lists of texts and images",
        "images": "paths of the images, in order, or one path (also named image)",
        "image": "the same as images",
        "prompt": "the request, instead of messages",
        "completion": "the answer to prompt",
        "system": "a system message (optional)",
    }
    distils = None
    Options = Options
    seq_len = 2048
    processor = "image and text"
    example_model = "llava-hf/llava-interleave-qwen-0.5b-hf"
    answers_images = True

    def __init__(self, setting: Setting):
        super().__init__(setting)
        require_pillow()
        if setting.options.chat_template is not None:
            setting.processor.chat_template = setting.tokenizer.chat_template
        if not self._has_template:
            raise ContractError(
                f"task={self.name} needs a chat template, and {type(setting.processor).__name__} has none; set task.chat_template to a file "
                "with the template of the model"
            )
        tokens = [getattr(setting.processor, name, None) for name in _PLACEHOLDERS]
        ids = [setting.tokenizer.convert_tokens_to_ids(token) for token in tokens if token]
        ids.append(getattr(setting.processor, "image_token_id", None))
        self.placeholders = {number for number in ids if number is not None}

    def packs(self) -> bool:
        return False

    @property
    def _renderer(self) -> Any:
        """What has the chat template: the processor, or its tokenizer."""
        processor = self.setting.processor
        has = getattr(processor, "chat_template", None) is not None
        return processor if has else self.setting.tokenizer

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        messages, images = conversation_with_images(row, self.setting.options.system)
        text, spans = self._text(messages, self.setting.options.train_on)
        ids = self._inputs([text], [images])["input_ids"][0].tolist()
        labels = self._labels(text, spans, ids)
        size = self.setting.seq_len
        if self.placeholders & set(ids[size:]):
            raise BadRow(
                f"it has {len(ids)} tokens, and training.seq_len={size} cuts off parts of its images; raise training.seq_len, or use "
                "smaller images"
            )
        features = {
            "text": text,
            "images": images,
            "input_ids": ids[:size],
            "labels": labels[:size],
        }
        # The first label has no output before it.
        return [Encoded(features, len(ids), sum(label != IGNORED for label in labels[1:size]))]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch with the processor: tokens ``Int64[rows, length]``, and pixels as the model wants them."""
        import torch

        batch = dict(self._inputs([row["text"] for row in rows], [row["images"] for row in rows]))
        shape = batch["input_ids"].shape
        labels = pad([row["labels"] for row in rows], IGNORED, 1)
        length = labels.shape[1]
        for name, value in batch.items():
            if isinstance(value, torch.Tensor) and value.shape == shape:
                batch[name] = value[:, :length]
        for ids, row in zip(batch["input_ids"].tolist(), rows, strict=True):
            if ids[: len(row["input_ids"])] != row["input_ids"]:
                raise ContractError(
                    f"the processor makes other tokens of {short(row['text'])} than before training; were its images changed?"
                )
        return batch | {"labels": labels}

    def render(self, features: dict[str, Any]) -> str:
        ids, labels = self._collapsed(features["input_ids"], features["labels"])
        return f"{marked(self.setting.tokenizer, ids, labels)} (images: {len(features['images'])})"

    def decoded(self, ids: list[int]) -> str:
        return self.setting.tokenizer.decode(self._collapsed(ids, ids)[0])

    def outside_loss(self, model: Any, rows: list[dict[str, Any]]) -> list[str]:
        return modules_outside_loss(model, self._on_device(model, self.collate(rows[:1])))

    def check_model(self, model: Any, rows: list[dict[str, Any]]) -> None:
        batch = self._on_device(model, self.collate(rows[:1]))
        del batch["labels"]
        other = next(i for i in range(2, 100) if i not in self.placeholders)
        require_blind_to_last(model, batch, other)

    def keep_of_logits(self, logits: Any, labels: Any) -> Any:
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits.argmax(-1)

    def prompt(self, row: dict[str, Any]) -> tuple[list[int], str]:
        text, images, answer = self._question(row)
        return self._inputs([text], [images])["input_ids"][0].tolist(), answer

    def context(self, row: dict[str, Any]) -> dict[str, torch.Tensor]:
        text, images, _ = self._question(row)
        return self._context(self._inputs([text], [images]))

    def prompt_with_images(
        self, text: str, images: Sequence[str]
    ) -> tuple[list[int], dict[str, torch.Tensor]]:
        row = {"prompt": text, "images": list(images)}
        messages, stored = conversation_with_images(
            row, self.setting.options.system, answered=False
        )
        found = self._inputs([self._rendered(messages, add_generation_prompt=True)], [stored])
        return found["input_ids"][0].tolist(), self._context(found)

    def _question(self, row: dict[str, Any]) -> tuple[str, list[str], str]:
        """The text before the last answer, the images in it, and the answer."""
        messages, images = conversation_with_images(row, self.setting.options.system)
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        shown = [p for m in messages[:last] for p in m["content"] if p["type"] == "image"]
        answer = "".join(part.get("text", "") for part in messages[last]["content"])
        text = self._rendered(messages[:last], add_generation_prompt=True)
        return text, images[: len(shown)], answer

    def _context(self, inputs: Any) -> dict[str, torch.Tensor]:
        own = ("input_ids", "attention_mask")
        return {name: value for name, value in inputs.items() if name not in own}

    def _inputs(self, texts: list[str], images: list[list[str]]) -> Any:
        """What the processor makes of texts and their images."""
        opened = [[open_image(image) for image in group] for group in images]
        try:
            return self.setting.processor(
                text=texts,
                images=opened,
                padding=True,
                add_special_tokens=self._adds_special(texts[0]),
                return_tensors="pt",
            )
        except ValueError as error:
            raise BadRow(
                f"the processor refuses it: {' '.join(str(error).split())[:300]}"
            ) from error

    def _adds_special(self, text: str) -> bool:
        """As transformers does: no second start of text if the template has written one."""
        start = self.setting.tokenizer.bos_token
        return start is None or not text.startswith(start)

    def _labels(self, text: str, spans: list[tuple[int, int]], ids: list[int]) -> list[int]:
        """The labels of ``ids``, from the places of the supervised parts in the text, in which an image is one token."""
        found = self.setting.tokenizer(
            text, add_special_tokens=self._adds_special(text), return_offsets_mapping=True
        )
        short_labels = [
            token
            if any(start < end and begin <= start < stop for begin, stop in spans)
            else IGNORED
            for token, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True)
        ]
        labels = with_images(found["input_ids"], short_labels, ids, self.placeholders)
        if labels is None:
            raise ContractError(
                f"{type(self.setting.processor).__name__} changes the text around images in a way in which the answers are not found again, so "
                f"their labels are not known; the text is {short(text)}"
            )
        return labels

    def _collapsed(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """Without the repetitions of tokens of images."""
        kept = [
            i
            for i, token in enumerate(ids)
            if token not in self.placeholders or i == 0 or ids[i - 1] != token
        ]
        return [ids[i] for i in kept], [labels[i] for i in kept]

    def _on_device(self, model: Any, batch: dict[str, Any]) -> dict[str, Any]:
        device = next(model.parameters()).device
        return {n: v.to(device) if hasattr(v, "to") else v for n, v in batch.items()}


def with_images(
    ids: list[int], labels: list[int], full: list[int], placeholders: set[int]
) -> list[int] | None:
    """Carry labels over to the tokens of a text in which each image has become many tokens.

    The parts of the text between images are found again in order, the first from the start and the last from the end.

    Args:
        ids: Tokens of the text, in which an image is one of ``placeholders``.
        labels: Their labels.
        full: Tokens of the same text with its images. Their labels are ignored.
        placeholders: Tokens that stand for images.

    Returns:
        The labels of ``full``, or ``None`` if a part of the text is not found.
    """
    inside = [
        list(group)
        for is_image, group in itertools.groupby(
            range(len(ids)), key=lambda index: ids[index] in placeholders
        )
        if not is_image
    ]
    found = [IGNORED] * len(full)
    at = 0
    for number, part in enumerate(inside):
        tokens = [ids[index] for index in part]
        if number == len(inside) - 1 and part[-1] == len(ids) - 1:
            start = max(at, len(full) - len(tokens))
        else:
            first = part[0] == 0
            start = next(
                (
                    s
                    for s in range(at, 1 if first else len(full))
                    if full[s : s + len(tokens)] == tokens
                ),
                len(full),
            )
        if full[start : start + len(tokens)] != tokens:
            return None
        found[start : start + len(tokens)] = [labels[index] for index in part]
        at = start + len(tokens)
    return found


TASK = VisionChat
